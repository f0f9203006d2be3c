"""Tiny models of nearly every causal architecture that transformers has, by one set of sizes.

``build(name)`` gives a model with random weights; a configuration takes of ``SIZES`` what it knows, and ``OWN`` is what
an architecture needs beside them.
"""

import inspect

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
# by value, each configuration's own name for it
SIZES = {
    "vocab_size": VOCABULARY,
    "use_cache": False,
    "q_lora_rank": None,
    **dict.fromkeys(["hidden_size", "n_embd", "word_embed_proj_dim", "d_model"], 32),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "mamba_n_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_experts_per_tok", "mamba_expand", "expand"], 2),
    **dict.fromkeys(["head_dim", "rotary_dim", "attention_head_size", "state_size", "mamba_d_state"], 8),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], 128),
    **dict.fromkeys(["sliding_window", "mamba_d_head", "kv_lora_rank"], 16),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["bos_token_id", "eos_token_id", "n_group", "topk_group", "mamba_n_groups"], 1),
    "moe_intermediate_size": 24,
    "pad_token_id": 0,
    **dict.fromkeys(["router_jitter_noise", "input_jitter_noise"], 0.0),
}
LATENT = {"num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 16}
OWN = {
    **dict.fromkeys(
        ["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"], LATENT
    ),
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "mlp", "attention", "moe"]},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 1,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "adapter_rank": 4,
    },
}
# encoders with a head for words, and what isn't a language model of its own or isn't built from such sizes
NOT_HERE = set(
    """
    aria_text axk2 bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small blt camembert
    cohere_compass_text cpmant ctrl data2vec-text dbrx deepseek_v32 deepseek_v4 dots3_note dots3_note_text electra emu3
    ernie fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git glm_moe_dsa got_ocr2
    hrm_text hy_v4 kimi_linear llama4 marian mbart megatron-bert mllama moss_transcribe_diarize musicgen
    musicgen_melody mvp openai-gpt pegasus phi4_multimodal plbart prophetnet qdqbert qwen3_5 qwen3_5_moe qwen4_exp
    reformer rembert roberta roberta-prelayernorm roc_bert roformer speech_to_text_2 transfo-xl trocr whisper xlm
    xlm-roberta xlm-roberta-xl xlnet xmod zaya
    """.split()
)
NAMES = sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING and name not in NOT_HERE)


def build(name: str, **own) -> torch.nn.Module:
    """The model ``AutoModelForCausalLM`` makes for this ``model_type``, in float32, of about 20,000 parameters."""
    config_class = CONFIG_MAPPING[name]
    known = set(inspect.signature(config_class.__init__).parameters) | set(
        getattr(config_class, "__dataclass_fields__", {})
    )
    known |= set(getattr(config_class, "attribute_map", {}))
    sizes = {field: value for field, value in SIZES.items() if field in known}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**sizes, **OWN.get(name, {}), **own}))
    for module in model.modules():  # nothing is drawn at random: it would depend on who shares a micro-batch
        for field, value in vars(module).items():
            if "drop" in field and isinstance(value, float):
                setattr(module, field, 0.0)
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    model.float()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # a norm's weight of 1 and a bias of 0 hide what a trained model shows
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for module in model.modules():  # a padding token of zeros has no norm to divide by in Gemma 3n
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                row = module.weight[module.padding_idx]
                row.add_(torch.randn(row.shape, generator=generator), alpha=0.02)
    return model
