"""Methods that are one short function each, the options of every method, and other names of methods."""

import json
import math
from itertools import combinations, product

import pytest
import torch
from harness import logged, table, train
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kernels import METHODS, check_normalization, normalize_rewards, normalize_with_statistics
from grpo_kernels.head.loss_checks import make_group_rewards
from grpo_kernels.normalize.functions import FUNCTIONS
from grpo_kernels.normalize.methods import ALIASES
from grpo_kernels.normalize.shared_options import most_varied_groups
from trl_ext import CurvatureGRPOConfig
from trl_ext.advantages.compute import compute_advantages, normalization_metrics, zero_variance_groups
from trl_ext.advantages.normalization_state import make_state, restore_states

NAN = float("nan")
GRADED = [[0.25, 1.0, 0.5, 0.0], [0.0, 0.0, 1.0, 1.0], [0.75, 0.75, 0.25, 0.5]]
SIX = [[0.25, 1.0, 0.5, 0.0, 0.75, 0.5]]


def context_of(rewards_PG) -> dict:
    return {"recent_mean": 0.4, "role_baseline": torch.full_like(rewards_PG, 0.25)}


def run(rewards, method, dtype=torch.float64, **options) -> torch.Tensor:
    rewards_PG = torch.tensor(rewards, dtype=dtype)
    return normalize_rewards(rewards_PG, method, context=context_of(rewards_PG), **options)


# ---- against the numbers of the authors' own functions, run once on the same rewards


@pytest.mark.parametrize(
    ("method", "options", "rewards", "expected"),
    [
        # verl 0.9.1, compute_grpo_passk_outcome_advantage with norm_adv_by_std_in_grpo=False: k is the group
        ("max_at_k", {"k": 4}, GRADED, [[0, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        # PKPO's sloo_minus_one, the paper's listing 1
        ("max_at_k", {"k": 2}, SIX, [[1 / 60, 0.2, 0.05, 0, 7 / 60, 0.05]]),
        ("max_at_k", {"k": 3}, SIX, [[0, 0.2125, 0.0125, 0, 0.0875, 0.0125]]),
        ("max_at_k", {"k": 6}, SIX, [[0, 0.25, 0, 0, 0, 0]]),
        # calc_adv of RUCAIBox/Passk_Training, 00474d7
        ("pass_at_k", {"k": 2}, [[1, 0, 0, 0, 0, 0.0]], [[1.414210562379459, *[-0.28284211247589197] * 5]]),
        ("pass_at_k", {"k": 4}, [[1, 0, 0, 0, 0, 0.0]], [[0.7071052811897294, *[-0.14142105623794612] * 5]]),
        ("pass_at_k", {"k": 4}, [[1, 1, 0, 0, 0, 0.0]], [[*[0.26726017048814815] * 2, *[-0.1336300852440742] * 4]]),
        ("pass_at_k", {"k": 2}, [[1, 1, 1, 1, 1, 0.0]], [[0] * 6]),
    ],
)
def test_the_peers_numbers(method, options, rewards, expected):
    found = run(rewards, method, eps=1e-6, **options)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_ha_dw_is_its_authors_code():
    """compute_ha_dw_outcome_advantage of yangfengkai/HA-DW, 8b08794, in float32, after batches of mean 0.2 and 0.6."""
    expected = [[-0.6839024, 1.9034580, 0.2114953, -1.5957723], [-1.4356567] * 2 + [1.1754162] * 2]
    expected += [[0.9987854, 0.9987854, -2.3039157, -0.4607832]]
    torch.testing.assert_close(run(GRADED, "ha_dw", eps=1e-6).float(), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    # by hand: m = 1/2, h = 0.4, std = 1/sqrt(3)
    by_hand = [side * 1.5 * math.exp(-side * 0.1) * 0.5 * math.sqrt(3) for side in (-1, -1, 1, 1)]
    assert run([[0, 0, 1, 1.0]], "ha_dw", eps=0.0)[0].tolist() == pytest.approx(by_hand)


# ---- by hand and by counting


def test_value_to_go_by_hand():
    """m = 1/4, n = 4: sqrt(1/2). With one reward missing m = 1/3, n = 3: sqrt(2/3)."""
    found = run([[1, 0, 0, 0], [NAN, 1, 0, 0.0]], "value_to_go")
    half, two_thirds = math.sqrt(0.5), math.sqrt(2 / 3)
    expected = [[0.75 / half, *[-0.25 / half] * 3], [0, 2 / 3 / two_thirds, *[-1 / 3 / two_thirds] * 2]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def best_of_sets(rewards, k):
    """``max_at_k`` by counting all sets of k answers."""
    n = len(rewards)
    totals = [0.0] * n
    for chosen in combinations(range(n), k):
        for i in chosen:
            totals[i] += max(rewards[j] for j in chosen) - max(rewards[j] for j in chosen if j != i)
    return [total / math.comb(n, k) for total in totals]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0, 5.0, -2.0, NAN]), min_size=2, max_size=7), st.integers(2, 5))
def test_max_at_k_counts_sets(rewards, k):
    known = [r for r in rewards if r == r]
    found = [a for a, r in zip(run([rewards], "max_at_k", k=k)[0].tolist(), rewards, strict=True) if r == r]
    assert found == pytest.approx(best_of_sets(known, min(k, len(known))) if len(known) > 1 else [0.0] * len(known))


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_max_at_k_is_unbiased_for_the_gradient_of_pass_at_k(p, k):
    """Over all outcomes of four answers that are right with probability p: d/dp (1 - (1 - p)^k)."""
    total = 0.0
    for outcome in product([0.0, 1.0], repeat=4):
        probability = math.prod(p if r else 1 - p for r in outcome)
        scores = [1 / p if r else -1 / (1 - p) for r in outcome]
        advantages = run([list(outcome)], "max_at_k", k=k)[0].tolist()
        total += probability * sum(a * s for a, s in zip(advantages, scores, strict=True))
    assert total == pytest.approx(k * (1 - p) ** (k - 1))


@pytest.mark.parametrize("k", [2, 3, 5])
def test_pass_at_k_is_the_mean_over_sets(k):
    """An answer's advantage is the mean, over the sets with it, of (the set passes - R) / sqrt(R (1 - R))."""
    rewards = [1.0, 0, 0, 1, 0, 0, 0]
    sets = list(combinations(range(7), k))
    passes = [any(rewards[i] for i in chosen) for chosen in sets]
    rate = sum(passes) / len(sets)
    expected = []
    for i in range(7):
        own = [passed for chosen, passed in zip(sets, passes, strict=True) if i in chosen]
        expected.append((sum(own) / len(own) - rate) / math.sqrt(rate * (1 - rate)))
    found = run([rewards], "pass_at_k", k=k, eps=0.0)[0]
    assert found.tolist() == pytest.approx(expected) and found.sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("method", FUNCTIONS)
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_unscorable_and_equal_groups(method, eps):
    rewards = [[0.0, 1.0, NAN, 0, 0, 0], [0.0] * 6, [1.0] * 6, [NAN] * 6, [1.0, *[NAN] * 5]]
    found = run(rewards, method, eps=eps)
    assert found.isfinite().all() and found[0, 2] == 0 and (found[3] == 0).all() and (found[0, 1] > 0)
    whole = run([[r for r in rewards[0] if r == r]], method, eps=eps)[0]
    assert found[0][[0, 1, 3, 4, 5]].tolist() == pytest.approx(whole.tolist())  # as if it hadn't been there
    assert ((found[[1, 2, 4]] == 0).all()) == METHODS[method].zero_if_equal
    if method not in ("pass_at_k", "rae"):
        assert (run([[0.1] * 8], method, torch.float32, eps=eps) == 0).all()  # trap 1
    single = run(rewards, method, torch.float32, eps=eps)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, found.float(), rtol=1e-6, atol=1e-6)
    assert normalize_rewards(torch.empty(0, 4), method, context=context_of(torch.empty(0, 4))).shape == (0, 4)


def test_pass_at_k_refuses_graded_rewards():
    with pytest.raises(ValueError, match="'pass_at_k' needs rewards of 0 or 1; 'max_at_k' takes others"):
        run(GRADED, "pass_at_k")


# ---- states


def test_recent_mean_by_hand():
    state = make_state("ha_dw", {"window": 2})
    assert state.context(torch.tensor([[0.0, 0.5]])) == {"recent_mean": 0.25}  # an evaluation before training
    for batch, mean in (([0.0, 0.5], 0.25), ([NAN, 1.0], 0.625), ([NAN, NAN], 0.625), ([0.0, 0.0], 0.5)):
        state.observe_rewards(torch.tensor([batch]))
        assert state.context(torch.zeros(1, 2)) == {"recent_mean": mean}


def test_rae_is_the_peers():
    """prime-rl's RAEAlgorithm on the same traces of two agents, decay 0.95; an unscored one changes nothing."""
    rewards, tasks = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]), torch.tensor([7, 9, 7])
    state = make_state("rae", {})

    def advantages(state):
        return normalize_rewards(rewards, "rae", context=state.context(rewards, tasks)).flatten().tolist()

    assert advantages(state) == pytest.approx([1.0, -0.05, 1.0, 0.95, 0.9525, 0.904875])
    assert advantages(state) == advantages(state)  # only training batches change it
    state.observe_rewards(rewards, tasks)
    assert state.context(torch.tensor([[NAN, 1.0, 1.0]]), torch.tensor([9]))["role_baseline"].tolist() == [
        pytest.approx([0.0975, 0.0975, 0.142625])
    ]


@pytest.mark.parametrize("method", ["ha_dw", "rae"])
def test_states_go_through_json(method):
    state, other = make_state(method, {}), make_state(method, {})
    for batch in ([[0.1, 0.7], [1.0, 1 / 3]], [[0.3, NAN], [0.2, 0.0]]):
        state.observe_rewards(torch.tensor(batch), torch.tensor([2**62 + 1, -5]))
    assert restore_states([other], json.loads(json.dumps([state.state_dict()])))
    assert other.state_dict() == state.state_dict()
    assert other.context(torch.ones(1, 2))  # the next batch sees the same


# ---- options of every method


@pytest.mark.parametrize("method", ["std", "rank", "global", "ha_dw", "max_at_k"])
def test_clip_limits_advantages(method):
    whole, clipped = run(SIX, method, k=3) if method == "max_at_k" else run(SIX, method), run(SIX, method, clip=0.1)
    if method != "max_at_k":
        torch.testing.assert_close(clipped, whole.clamp(-0.1, 0.1), rtol=0, atol=0)
    assert clipped.abs().max() == 0.1 < whole.abs().max()


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.zero_if_equal and not kind.needs])
def test_within_the_tolerance_rewards_are_equal(method):
    """A judge's 0.6667 and 0.66670001; the spread counts, as in SkyRL: 0.0625 = 1/16 is within 0.0625."""
    if method == "pass_at_k":
        return  # takes rewards of 0 and 1 only
    rewards = [[0.6667, 0.66670001, 0.6667, NAN], [0.5, 0.5625, 0.5, 0.53], [0.0, 1.0, 0.0, 0.5]]
    options = {"alpha": 0.5} if method == "power" else {}
    found = [run(rewards, method, tolerance=tolerance, **options) for tolerance in (0.0, 1e-6, 0.0625)]
    live = [(advantages != 0).any(1).tolist() for advantages in found]
    assert live == [[True] * 3, [False, True, True], [False, False, True]]
    if METHODS[method].kind == "group":
        torch.testing.assert_close(found[2][2], found[0][2], rtol=0, atol=0)


def test_methods_that_use_equal_rewards_get_their_mean():
    assert run([[0.5, 0.5625, 0.5, NAN]], "none", tolerance=0.1)[0].tolist() == pytest.approx([0.5208333] * 3 + [0])


def test_the_filter_keeps_what_the_peer_keeps():
    """VAGEN's reward_variance_top_p_filter (RAGEN-2's authors) with ddof=1: variances 1/4, 1/3, 0, 1/150, 1/4."""
    rewards = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0.5] * 4, [0.6, 0.4, 0.5, 0.5], [0, 1, 1, 1]])
    kept = {share: most_varied_groups(rewards, share).nonzero().flatten().tolist() for share in (0.3, 0.5, 0.9, 0.999)}
    assert kept == {0.3: [1], 0.5: [0, 1], 0.9: [0, 1, 4], 0.999: [0, 1, 3, 4]}
    assert most_varied_groups(rewards, 1.0).tolist() == [True, True, False, True, True]
    even = torch.tensor([[0.1, 0.2, 0.7]] * 4)
    assert most_varied_groups(even, 0.5).tolist() == [True, True, False, False]  # rounding adds no third
    assert most_varied_groups(torch.tensor([[NAN, 1.0], [0.3, 0.3]]), 1.0).tolist() == [False, False]
    whole = normalize_rewards(rewards, "std")
    whole[[2, 3, 4]] = 0
    torch.testing.assert_close(normalize_rewards(rewards, "std", keep_variance=0.5), whole, rtol=0, atol=0)


def test_limits_apply_to_the_sum_of_functions_that_are_normalised_each():
    generator = torch.Generator().manual_seed(0)
    rewards, weights = torch.rand(12, 2, generator=generator), torch.tensor([1.0, 0.5])
    each = "normalize_then_sum"
    plain = compute_advantages(rewards, weights, 4, "std", {}, each).advantages
    limited = compute_advantages(rewards, weights, 4, "std", {"clip": 0.5, "keep_variance": 0.4}, each).advantages
    kept = most_varied_groups((rewards @ weights).view(3, 4), 0.4)
    assert 0 < kept.sum() < 3
    torch.testing.assert_close(limited, plain.clamp(-0.5, 0.5) * kept[:, None], rtol=0, atol=0)
    # each function's spread is within the tolerance, the sum's isn't: dead if each is normalised by itself
    near = torch.tensor([[0.0, 0.0], [0.1, 0.1]])
    dead = [zero_variance_groups(near, torch.ones(2), 2, how, 0.15).tolist() for how in ("sum_then_normalize", each)]
    assert dead == [[False], [True]]
    assert (compute_advantages(near, torch.ones(2), 2, "std", {"tolerance": 0.15}, each).advantages == 0).all()


def test_left_out_groups_are_counted():
    rewards = torch.tensor([1, 0, 1, 1, 0, 0.1, 1, 1.001])[:, None]
    made = normalize_with_statistics(rewards.view(4, 2), "std", tolerance=0.01, keep_variance=0.9)
    metrics = normalization_metrics(rewards, torch.ones(1), 2, "sum_then_normalize", made, 0.01, 0.9)
    assert metrics["normalization/zero_variance_frac"] == 0.5 and metrics["normalization/left_out_frac"] == 0.25
    assert (made.advantages[1:] == 0).all() and (made.advantages[0] != 0).all()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("std", {"clip": 0.0}, r"clip=0.0 must be a number in \(0, inf\)"),
        ("std", {"tolerance": -1e-6}, r"tolerance=-1e-06 must be a number in \[0, inf\)"),
        ("std", {"keep_variance": 1.5}, r"keep_variance=1.5 must be a number in \(0, 1\]"),
        ("max_at_k", {"k": 2.0}, r"k=2.0 must be a whole number in \[2, inf\)"),
        ("pass_at_k", {"k": 1}, r"k=1 must be a whole number"),
        ("ha_dw", {"window": 0}, r"window=0 must be a whole number in \[1, inf\)"),
        (lambda rewards_PG, context: rewards_PG, {"clip": 1.0}, r"can't be called with .*clip=1.0"),
    ],
)
def test_bad_options_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        check_normalization(method, **options)


def test_the_loss_that_normalises_refuses_them():
    rewards = torch.tensor([[0.0, 1.0]] * 2), torch.tensor([0, 1])
    for method, options in (("std", {"clip": 1.0}), ("value_to_go", {})):
        with pytest.raises(ValueError, match="advantages instead of rewards"):
            make_group_rewards(rewards, (method, options), 2, torch.device("cpu"))


# ---- other names


def test_other_names():
    assert set(ALIASES.values()) <= set(METHODS) and not ALIASES.keys() & METHODS.keys()
    rewards = torch.tensor(GRADED)
    for name in ("grpo", "dr_grpo", "rloo", "lite_ppo", "reinforce++", "gopo", "maxrl"):
        assert torch.equal(normalize_rewards(rewards, name), normalize_rewards(rewards, ALIASES[name]))
    with pytest.raises(ValueError, match=r"\(or bnpo, .*rloo\), or give a function. Did you mean 'dr_grpo'"):
        check_normalization("dr_grp")


def test_a_run_knows_one_name(tmp_path):
    config = CurvatureGRPOConfig(output_dir=str(tmp_path), normalization="rloo", what_if=["maxrl"], bf16=False)
    assert config.normalization == "loo" and config.to_dict()["normalization"] == "loo"
    with pytest.raises(ValueError, match=r"normalization='loo' contradicts scale_rewards='batch'"):
        CurvatureGRPOConfig(output_dir=str(tmp_path), normalization="rloo", scale_rewards="batch", bf16=False)
    CurvatureGRPOConfig(output_dir=str(tmp_path), normalization="lite_ppo", scale_rewards="batch", bf16=False)


# ---- runs


def test_a_run_skips_and_counts_what_the_tolerance_makes_equal(tiny_policy, tmp_path):
    def judged(completions, **kwargs):
        return [0.7, 0.7, 0.70001, 0.7, 0.0, 0.25, 0.5, 1.0]

    options = {"normalization": "grpo", "normalization_kwargs": {"tolerance": 1e-3, "clip": 0.9}, "max_steps": 1}
    trainer = train(tiny_policy, tmp_path, judged, **options)
    log = logged(trainer)[0]
    assert log["normalization/zero_variance_frac"] == 0.5 and log["normalization/advantage_max"] == pytest.approx(0.9)
    advantages = table(trainer, "advantages")
    assert advantages[:4] == [0.0] * 4 and max(map(abs, advantages[4:])) == pytest.approx(0.9)


@pytest.mark.parametrize(("method", "options"), [("ha_dw", {"keep_variance": 0.6}), ("rae", {})])
def test_a_resumed_run_goes_on_as_the_whole_one(method, options, tiny_policy, tmp_path):
    def graded(completion_ids, **kwargs):
        return [(sum(ids) % 5) / 4 for ids in completion_ids]

    chosen = {"normalization": method, "normalization_kwargs": options, "max_steps": 2, "interference_every": 0}
    chosen |= {"save_strategy": "steps", "save_steps": 1}
    whole = train(tiny_policy, tmp_path, graded, **chosen)
    resumed = train(tiny_policy, tmp_path, graded, **chosen, resume=str(tmp_path / "checkpoint-1"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert ("normalization/left_out_frac" in logged(whole)[0]) == ("keep_variance" in options)
