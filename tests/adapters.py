"""Every kind of adapter that peft has, on a tiny Llama of ``architectures.py``."""

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

CAUSAL = {"task_type": "CAUSAL_LM"}
LINEAR = {**CAUSAL, "target_modules": "all-linear"}
SOME = {**CAUSAL, "target_modules": ["q_proj", "v_proj"]}
LORA = {**LINEAR, "r": 4, "lora_dropout": 0.0}
# sizes and places; where a kind isn't named its own defaults do, on q_proj and v_proj
KINDS = {
    "LoRA": lambda: peft.LoraConfig(**LORA),
    "rsLoRA": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "DoRA": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "LoRA, PiSSA": lambda: peft.LoraConfig(**LORA, init_lora_weights="pissa"),
    "LoRA with bias": lambda: peft.LoraConfig(**LORA, bias="lora_only"),
    "LoRA with lora_bias": lambda: peft.LoraConfig(**LORA, lora_bias=True),
    "LoRA on embeddings": lambda: peft.LoraConfig(**CAUSAL, r=4, target_modules=["embed_tokens", "q_proj"]),
    "LoRA on the head": lambda: peft.LoraConfig(**CAUSAL, r=4, target_modules=["lm_head", "q_proj"]),
    "LoRA and a saved head": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "LoRA and saved embeddings": lambda: peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "LoRA and new tokens": lambda: peft.LoraConfig(**LORA, trainable_token_indices=[5, 6, 7]),
    "LoRA on a parameter": lambda: peft.LoraConfig(**CAUSAL, r=4, target_parameters=["mlp.up_proj.weight"]),
    "AdaLora": lambda: peft.AdaLoraConfig(**LINEAR, init_r=4, target_r=2, total_step=20, tinit=3, tfinal=3),
    "IA3": lambda: peft.IA3Config(
        **CAUSAL, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LoHa": lambda: peft.LoHaConfig(**LINEAR, r=4),
    "LoKr": lambda: peft.LoKrConfig(**LINEAR, r=4),
    "OFT": lambda: peft.OFTConfig(**LINEAR, oft_block_size=8),
    "BOFT": lambda: peft.BOFTConfig(**LINEAR, boft_block_size=4),
    "HRA": lambda: peft.HRAConfig(**LINEAR, r=4),
    "LN tuning": lambda: peft.LNTuningConfig(**CAUSAL, target_modules=["input_layernorm", "norm"]),
    "FourierFT": lambda: peft.FourierFTConfig(**SOME, n_frequency=16),
    "VeRA": lambda: peft.VeraConfig(**SOME, r=4),
    "VBLoRA": lambda: peft.VBLoRAConfig(**SOME, r=4, num_vectors=8, vector_length=8, topk=2),
    "trainable tokens": lambda: peft.TrainableTokensConfig(**CAUSAL, token_indices=[5, 6, 7]),
    "prompt tuning": lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(**CAUSAL, num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix tuning": lambda: peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3),
    "LLaMA-Adapter": lambda: peft.AdaptionPromptConfig(**CAUSAL, adapter_len=3, adapter_layers=2),
    "MiSS": lambda: peft.MissConfig(**LINEAR, r=4),
    "RandLora": lambda: peft.RandLoraConfig(**SOME, r=4),
    "SHiRA": lambda: peft.ShiraConfig(**SOME, r=4),
    "C3A": lambda: peft.C3AConfig(**SOME, block_size=8),
    "RoAd": lambda: peft.RoadConfig(**SOME, group_size=8),
    "Delora": lambda: peft.DeloraConfig(**SOME, r=4),
    "GraLoRA": lambda: peft.GraloraConfig(**SOME, r=4, gralora_k=2),
    "HiRA": lambda: peft.HiraConfig(**SOME, r=4),
    "WaveFT": lambda: peft.WaveFTConfig(**SOME, n_frequency=16),
    "CPT": lambda: peft.CPTConfig(**CAUSAL),
    "cartridges": lambda: peft.CartridgeConfig(**CAUSAL, num_virtual_tokens=3),
    "multitask prompt tuning": lambda: peft.MultitaskPromptTuningConfig(**CAUSAL, num_virtual_tokens=3, num_tasks=1),
    "PSOFT": lambda: peft.PsoftConfig(**SOME, r=4),
    "X-LoRA": lambda: peft.XLoraConfig(**CAUSAL),
}


def is_known(kind) -> bool:
    """Whether this peft has the configuration's class; an older one lacks some."""
    return all(hasattr(peft, name) for name in kind.__code__.co_names if name.endswith("Config"))


KINDS = {name: kind for name, kind in KINDS.items() if is_known(kind)}
NOT_HERE = {"ADAMSS": "needs scikit-learn", "PVERA": "draws noise for each place in a micro-batch: never equal"}
_taken = {kind().peft_type.value for kind in KINDS.values()}
KINDS |= {
    kind.value: (lambda config=config: config(**SOME))
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if kind.value not in {*_taken, *NOT_HERE}
}
