"""Tiny models with the built-in tokenizer, for tests that train through the real trainer."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, CohereConfig, Gemma2Config, GraniteConfig, MixtralConfig, PretrainedConfig
from transformers.models.auto import AutoModelForCausalLM

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
# what the head does to its logits, or a loss of the model's own
HEADS = {
    "softcap": Gemma2Config(**TINY, head_dim=16, final_logit_softcapping=2.0, tie_word_embeddings=True),
    "logit scale": CohereConfig(**TINY, logit_scale=0.25),
    "divided logits": GraniteConfig(**TINY, logits_scaling=3.0),
    "mixture of experts": MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5),
}


def save_model(config: PretrainedConfig, policy: Path, folder: Path) -> Path:
    """Saves a model of this configuration with the tokenizer of ``policy``; its folder."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
