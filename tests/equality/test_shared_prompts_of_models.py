"""Which models and options let a prompt run once for all its answers: rows of all lengths against those of its own."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from architectures import NAMES
from architectures import build as build_architecture
from harness import OLD_TRANSFORMERS

from trl_ext.head.forward import FusedHead
from trl_ext.head.patch import add_fused_head
from trl_ext.head.settings import read_settings
from trl_ext.plan.padding import trimmed_columns
from trl_ext.plan.probe_sharing import why_not_shared
from trl_ext.sharing.hooks import add_sharing_hooks
from trl_ext.sharing.packed_rows import pack


def why_not(model, trims_prompts=True, **options):
    """What a trainer of this model would say."""
    options = {"share_prompts": True, "fused_loss": True, **options}
    settings = SimpleNamespace(options=SimpleNamespace(**options), accelerator=Accelerator(cpu=True))
    return why_not_shared(settings, model, trims_prompts)


SHARED = ("gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe")
KNOWN = {
    **dict.fromkeys(SHARED),
    **dict.fromkeys(("bloom", "gpt2", "mamba"), "depends on the padding before the sequence"),
    "gpt_oss": "",
    "gemma2": "its attention takes softcap",
    "phimoe": "only its attention mask has the sliding window",
}


@pytest.mark.parametrize(
    "name", [name if name in KNOWN else pytest.param(name, marks=pytest.mark.nightly) for name in NAMES]
)
def test_architectures_that_may_and_may_not(name):
    """Where one may, rows of all lengths are those of its own, sliding windows (16 here) and all."""
    model = build_architecture(name)
    trims_prompts, _ = trimmed_columns(model, print)
    add_fused_head(model, FusedHead(read_settings(model), entropy=True))
    not_shared = why_not(model, trims_prompts)
    # in transformers 5.5 Gemma 3 depends on the padding
    if name in KNOWN and not (name == "gemma3_text" and OLD_TRANSFORMERS):
        assert (not_shared is None) == (KNOWN[name] is None), not_shared
        assert KNOWN[name] is None or KNOWN[name] in str(not_shared)
    if not_shared is not None:
        return
    model = model.eval()
    add_sharing_hooks(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 96, (4, 40), generator=generator)
    ids[1:3, :10] = ids[0, :10]
    mask = (torch.arange(40) < torch.tensor([[40], [25], [12], [33]])).long()
    mask[3, :4] = 0
    backbone = model.base_model if model.base_model is not model else model.model
    rows = pack(ids, mask, 10)
    with torch.no_grad():
        own = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
        packed = backbone(**rows.inputs(ids), use_cache=False).last_hidden_state[0]
    assert (packed[rows.packed_BC[mask.bool()]] - own).norm() <= 1e-5 * own.norm()


@pytest.mark.parametrize("options", [{"share_prompts": False}, {"fused_loss": False}], ids=str)
def test_options_that_do_not_allow_it(options):
    ((name, value),) = options.items()
    assert why_not(build_architecture("llama"), **options) == f"{name}={value}"
