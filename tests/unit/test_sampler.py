"""Sampler against trainer: by hand, against distributions that are known, and warnings before a run."""

import math
from types import SimpleNamespace

import pytest
import torch
from harness import logged, train
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.advantages.sampler_metrics import sampler_metrics
from trl_ext.run_checks import warn_about_truncated_sampling
from trl_ext.schema import Sequences

ALONE = SimpleNamespace(gather=lambda values: values)


def batch(trainer, sampler, mask=None, **more):
    trainer, sampler = torch.tensor(trainer), torch.tensor(sampler)
    mask = torch.ones_like(trainer, dtype=torch.int64) if mask is None else torch.tensor(mask)
    names = {"old_per_token_logps": trainer, "sampling_per_token_logps": sampler, "completion_mask": mask}
    return Sequences({**names, **more})


def test_by_hand():
    """Ratios 2, 1/2, 1 and 4; the last answer has one token, whose neighbour is padding."""
    log = torch.log(torch.tensor([[2.0, 0.5], [1.0, 4.0], [4.0, 7.0]])).tolist()
    found = sampler_metrics(batch(log, [[0.0] * 2] * 3, [[1, 1], [1, 1], [1, 0]]), ALONE)
    ratios = [2.0, 0.5, 1.0, 4.0, 4.0]
    # their logs sum to log 2 + log(1/2) + 0 + log 4 + log 4
    assert found["sampler/kl"] == pytest.approx((sum(ratios) - 5 - 2 * math.log(4)) / 5)
    assert found["sampler/chi_square"] == pytest.approx((1 + 0.25 + 0 + 9 + 9) / 5)
    assert found["sampler/ess_tokens"] == pytest.approx(11.5**2 / (5 * (4 + 0.25 + 1 + 16 + 16)))
    assert found["sampler/ess"] == pytest.approx((1 + 4 + 4) ** 2 / (3 * (1 + 16 + 16)))  # products 1, 4, 4


def test_tokens_without_a_log_prob_are_left_out():
    nan = float("nan")
    one = sampler_metrics(batch([[0.5, 0.7]], [[0.1, nan]]), ALONE)  # vLLM couldn't score it
    assert one == sampler_metrics(batch([[0.5]], [[0.1]]), ALONE)
    tools = {"tool_mask": torch.tensor([[1, 0]])}
    assert sampler_metrics(batch([[0.5, 9.0]], [[0.1, 0.0]], **tools), ALONE) == one
    assert sampler_metrics(Sequences({"old_per_token_logps": torch.zeros(1, 1)}), ALONE) == {}
    assert sampler_metrics(batch([[0.5]], [[0.1]], [[0]]), ALONE) == {}
    long = sampler_metrics(batch([[300.0, 300.0], [0.0, 0.0]], [[0.0, 0.0]] * 2), ALONE)
    assert long["sampler/ess"] == 0.5  # no overflow


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6), st.lists(st.floats(-2, 2), min_size=2, max_size=6))
def test_metrics_of_samples_are_those_of_the_distributions(mu, pi):
    """Every token as often as the sampler draws it: a batch in which counts are exact."""
    n = min(len(mu), len(pi))
    counts = (torch.tensor(mu[:n]).double().softmax(0) * 200).round().clamp(min=1)
    mu = counts / counts.sum()
    pi = torch.tensor(pi[:n]).double().softmax(0)
    drawn = torch.arange(n).repeat_interleave(counts.long())
    found = sampler_metrics(batch(pi.log()[drawn][:, None].tolist(), mu.log()[drawn][:, None].tolist()), ALONE)
    chi_square = float((pi.square() / mu).sum() - 1)
    assert found["sampler/kl"] == pytest.approx(float((mu * (mu / pi).log()).sum()), rel=1e-4, abs=1e-6)
    assert found["sampler/chi_square"] == pytest.approx(chi_square, rel=1e-4, abs=1e-6)
    assert found["sampler/ess"] == pytest.approx(1 / (1 + chi_square), rel=1e-4) == found["sampler/ess_tokens"]


def test_a_run_whose_rollouts_return_their_log_probs(tiny_policy, tmp_path):
    """As with vLLM, by a rollout function: a sampler that gave every token half of what the trainer does."""

    def reward(completion_ids, **kwargs):
        return [(ids[0] % 5) / 4 for ids in completion_ids]

    def rollouts(prompts, trainer):
        tokenizer = trainer.processing_class
        generator = torch.Generator().manual_seed(trainer.state.global_step)
        completions = torch.randint(4, len(tokenizer), (len(prompts), 3), generator=generator).tolist()
        ids = [tokenizer.encode(f"<user>{prompt[0]['content']}<assistant>") for prompt in prompts]
        whole = [torch.tensor([a + b]) for a, b in zip(ids, completions, strict=True)]
        with torch.no_grad():
            logits = [trainer.model(row).logits[0].log_softmax(-1) for row in whole]
        logps = [
            (one[len(a) - 1 : -1].gather(1, torch.tensor(b)[:, None])[:, 0] - math.log(2)).tolist()
            for one, a, b in zip(logits, ids, completions, strict=True)
        ]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logps}

    # a step that isn't whole generations: TRL keeps the old log-probs
    options = {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "skip_zero_advantage": False}
    trainer = train(tiny_policy, tmp_path, reward, rollout_func=rollouts, interference_every=0, **options)
    log = logged(trainer)[0]
    assert log["sampler/kl"] == pytest.approx(2 - 1 - math.log(2), abs=1e-3)
    assert log["sampler/chi_square"] == pytest.approx(1.0, abs=1e-3)
    assert log["sampler/ess"] == pytest.approx(1.0, abs=1e-4)  # all alike: as good as its own, times a constant


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 50, "min_p": 0.1}, "top_k=50, min_p=0.1"),
        ({"generation_kwargs": {"top_p": 0.5}}, "top_p=0.5"),
        ({}, None),
        ({"top_p": 0.9, "vllm_importance_sampling_correction": False}, None),
        ({"top_p": 0.9, "use_vllm": False}, None),
        ({"top_p": 0.9, "generation_kwargs": {"top_p": None, "top_k": -1}}, None),
    ],
)
def test_truncated_sampling_is_named(options, named):
    logged = []
    defaults = {"use_vllm": True, "vllm_importance_sampling_correction": True, "top_p": 1.0, "top_k": 0, "min_p": None}
    args = SimpleNamespace(**{**defaults, "generation_kwargs": None, **options})
    warn_about_truncated_sampling(args, logged.append)
    assert len(logged) == (named is not None)
    if named:
        assert logged[0].startswith(f"{named}: vLLM samples from a truncated distribution") and "6789" in logged[0]
