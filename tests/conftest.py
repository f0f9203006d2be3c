"""Shared by all tests: no hub, no telemetry, small real models made on the spot."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
if "PYTEST_XDIST_WORKER" in os.environ:  # as many test processes as cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported; gpu-marked runs set it to 0

from pathlib import Path

import pytest

from examples.tasks import mixed_policy as mixed
from trl_ext.cache import cache_folder
from trl_ext.tasks import small_policy

ROOT = Path(__file__).parents[1]
# what is made for tests isn't what a user's run finds; scripts that tests start find it
if Path(os.environ.get("CURVATURE_GRPO_CACHE", "")).name != "of-tests":
    os.environ["CURVATURE_GRPO_CACHE"] = str(cache_folder() / "of-tests")
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def imports_set_aside() -> None:
    """Keeps collections of garbage short: accelerate makes one in each ``train``, half a second over all imports."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> Path:
    """Folder of the built-in architecture with random weights and its real tokenizer (no warm-up)."""
    from harness import save_policy

    return save_policy(tmp_path_factory.mktemp("tiny-policy"))


@pytest.fixture(scope="session")
def warm_policy() -> Path:
    """Folder of the built-in policy, where scripts find it (cached between sessions). Its warm-up ends early, after
    some seconds; the whole one is nightly's.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_policy.WarmUp, "learned", 0.3)
        return small_policy.small_policy(42)  # the default seed of the script's arguments


@pytest.fixture(scope="session")
def mixed_policy() -> Path:
    """The same of the mixture, what the script runs without arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed, "LEARNED_ACCURACY", 0.1)
        patch.setattr(mixed, "CARELESS_STEPS", 1)
        return mixed.mixed_policy(42)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with GSM8K, MATH-500 and MAWPS; the test is skipped where it isn't there."""
    if not DATA.is_dir():
        pytest.skip("the folder with real data, ../shared/data, isn't there")
    return DATA


@pytest.fixture(scope="session")
def reported_run(tiny_policy, tmp_path_factory) -> Path:
    """Folder of a real run of six steps, all of them logged: for the report."""
    from harness import reward_with_dead, train

    folder = tmp_path_factory.mktemp("runs") / "first"
    options = {"gradient_accumulation_steps": 4, "interference_every": 1, "interference_dim": 16, "max_steps": 6}
    train(tiny_policy, folder, reward_with_dead(0.2), save_strategy="steps", save_steps=4, **options).save_state()
    return folder


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, int]]:
    """(sequences, columns) of each forward with a gradient through the backbone, the rehearsal's left aside."""
    import torch

    monkeypatch.setattr("trl_ext.recorder.recorder.probe_layers", lambda *args: None)
    seen = []
    forward = torch.nn.Embedding.forward

    def spy(self, ids):
        if torch.is_grad_enabled() and ids.dim() == 2:
            seen.append(tuple(ids.shape))
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", spy)
    return seen
