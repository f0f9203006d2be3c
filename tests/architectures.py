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
SIZES = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "use_cache": False,
    # decoders of all ages
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "n_inner": 48,
    "rotary_dim": 8,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_hidden_size": 48,
    "attention_head_size": 8,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
    # states and latent attention
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "expand": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LATENT = {"num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 16}
OWN = {
    "axk1": LATENT,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "longcat_flash": LATENT,
    "minicpm3": LATENT,
    "youtu": LATENT,
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
NOT_HERE = {
    "aria_text",
    "axk2",
    "bart",
    "bert",
    "bert-generation",
    "big_bird",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "blt",
    "camembert",
    "cohere_compass_text",
    "cpmant",
    "ctrl",
    "data2vec-text",
    "dbrx",
    "deepseek_v32",
    "deepseek_v4",
    "dots3_note",
    "dots3_note_text",
    "electra",
    "emu3",
    "ernie",
    "fuyu",
    "gemma3",
    "gemma3n",
    "gemma4",
    "gemma4_assistant",
    "gemma4_unified",
    "gemma4_unified_assistant",
    "git",
    "glm_moe_dsa",
    "got_ocr2",
    "hrm_text",
    "hy_v4",
    "kimi_linear",
    "llama4",
    "marian",
    "mbart",
    "megatron-bert",
    "mllama",
    "moss_transcribe_diarize",
    "musicgen",
    "musicgen_melody",
    "mvp",
    "openai-gpt",
    "pegasus",
    "phi4_multimodal",
    "plbart",
    "prophetnet",
    "qdqbert",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp",
    "reformer",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "speech_to_text_2",
    "transfo-xl",
    "trocr",
    "whisper",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlnet",
    "xmod",
    "zaya",
}
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
