"""On a second GPU, or any: every tensor that is made or launched is on the device of the inputs, which is current.

No GPU is needed (``far_tensors.py``): public functions, and forward and backward of both autograd Functions, run on
tensors that say they are on ``cuda:1``, kernels interpreted, and give the CPU's values. Autograd itself
can't be run so (torch without CUDA aborts), and with it the trainer's path: that is left to ``make gpu``, test_gpu.py.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from far_tensors import CurrentDevice, Far, InterpretedKernel, far_away, near
from kernel_inputs import INTERPRETED, context_of, method_options
from torch.utils._pytree import tree_flatten, tree_map_only

from grpo_kernels import METHODS, linear_grpo_loss, linear_logprob, normalize_with_statistics, use_backend
from grpo_kernels.head.linear_grpo_loss import LinearGRPOLossFunction, LossCall
from grpo_kernels.head.linear_logprob import LinearLogprobFunction
from grpo_kernels.head.loss_checks import check_loss_options, make_group_rewards
from grpo_kernels.head.products import HeadSketch, compute_dtype
from grpo_kernels.head.rows import triton_rows
from grpo_kernels.head.rows.plain import Transform
from grpo_kernels.head.token_losses import TokenInputs
from grpo_kernels.interference.curvature import directional_curvature, fisher_trace
from grpo_kernels.interference.metrics import interference_metrics
from grpo_kernels.interference.projections import Projections
from grpo_kernels.interference.sequence_rows import SequenceRows
from grpo_kernels.interference.sketch_error import predicted_rmse
from grpo_kernels.interference.step_gradients import StepGradients
from grpo_kernels.launch import launch
from grpo_kernels.normalize import triton_groups

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
N, H, V, B, G, R = 12, 16, 37, 6, 3, 2


@pytest.fixture
def device():
    """Not the one that is current unless somebody makes it so."""
    return torch.device("cuda:1")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Names of the kernels that were launched, in order."""
    current, names = CurrentDevice(), []
    monkeypatch.setattr(torch.cuda, "device", current)
    for module in (triton_rows, triton_groups):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, InterpretedKernel(kernel, current, names))
    return names


def away(value, device):
    return tree_map_only(torch.Tensor, lambda tensor: Far(tensor.clone(), device), value)


def assert_there(found, expected, device, *, rtol=1e-4, atol=1e-5):
    """Every tensor is on ``device``, with these values."""
    found, expected = tree_flatten(found)[0], tree_flatten(expected)[0]
    assert len(found) == len(expected)
    for mine, its in zip(found, expected, strict=True):
        if isinstance(its, torch.Tensor):
            assert mine.device == device
            torch.testing.assert_close(near(mine), its, rtol=rtol, atol=atol, equal_nan=True)
        else:
            assert mine == (its if its is None else pytest.approx(its, rel=1e-9))


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "hidden": normal(N, H).to(dtype),
        "weight": (normal(V, H) * 0.3).to(dtype),
        "bias": normal(V),
        "low_inputs": normal(N, R).to(dtype),
        "low_weight": normal(V, R).to(dtype),
        "targets": torch.randint(V, (N,), generator=generator),
        "sequence": torch.arange(N) // (N // B),
        "weights": torch.rand(B, generator=generator),
        "advantages": normal(B).round(),
        "rewards": torch.randint(2, (B, G), generator=generator).float(),
        "position": torch.arange(B) % G,
        "old": normal(N) * 0.3 - 3,
        "ref": normal(N) * 0.1 - 3,
        "scale": torch.rand(N, generator=generator) + 0.5,
        "projection": normal(V, 4),
        "upstream": normal(N).round(),
    }


LOSSES = {
    "on policy": {"signal": "advantages", "loss_type": "grpo"},
    "clipped": {"signal": "advantages_N", "loss_type": "grpo", "old": True},  # rows without a gradient leave the tile
    "off policy": {"signal": "advantages_N", "loss_type": "dapo", "old": True, "beta": 0.1, "delta": 1.5},
    "rewards": {"signal": "rewards", "loss_type": "cispo", "old": True, "scaled": True},
    "entropy": {"signal": "rewards", "loss_type": "sapo", "entropy_coef": 0.01, "softcap": 5.0},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IN_PASSES = [torch.float32, torch.float16]  # float16 has a unit of its own


def public_loss(given, signal, loss_type, *, old=False, scaled=False, beta=0.0, **extra):
    signals = {
        "advantages": given["advantages"],
        "advantages_N": given["upstream"],
        "rewards": (given["rewards"], given["position"]),
    }
    named = {"advantages": None, signal: signals[signal]}
    return linear_grpo_loss(
        given["hidden"],
        given["weight"],
        given["targets"],
        given["sequence"],
        named.pop("advantages"),
        given["weights"],
        **named,
        loss_type=loss_type,
        bias=given["bias"].to(given["hidden"].dtype),
        low_rank=(given["low_inputs"], given["low_weight"]),
        old_logprobs_N=given["old"] if old else None,
        ref_logprobs_N=given["ref"] if beta else None,
        policy_scale_N=given["scale"] if scaled else None,
        beta=beta,
        **extra,
    )


def tolerance(dtype):
    return {"rtol": 0.05, "atol": 0.05} if dtype.itemsize == 2 else {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOSSES)
def test_linear_grpo_loss(case, dtype, device, launched):
    given = inputs(dtype)
    with use_backend("torch"), torch.no_grad():
        expected = dataclasses.asdict(public_loss(given, **LOSSES[case]))
    far = away(given, device)
    with far_away(device):
        found = vars(public_loss(far, **LOSSES[case]))
    assert_there(found, expected, device, **tolerance(dtype))
    assert ("_grpo_rows_kernel" in launched) == (dtype != torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy", [False, True])
def test_linear_logprob(entropy, dtype, device, launched):
    def call(given):
        low_rank = (given["low_inputs"], given["low_weight"])
        return linear_logprob(given["hidden"], given["weight"], given["targets"], low_rank=low_rank, entropy=entropy)

    with use_backend("torch"), torch.no_grad():
        expected = call(inputs(dtype))
    far = away(inputs(dtype), device)
    with far_away(device):
        found = call(far)
    assert_there(found, expected, device, **tolerance(dtype))
    assert launched == ([] if dtype == torch.float64 else ["_softmax_rows_kernel"])


class Context(SimpleNamespace):
    """Stands for what autograd gives ``forward`` and ``backward``."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


NEEDS = {
    "all": [True] * 5,
    "frozen head": [True, False, False, True, False],
    "adapter": [True, False, False, True, True],
}


def loss_passes(given, need, signal, loss_type, *, old=False, scaled=False, entropy_coef=0.0, softcap=None, **options):
    """Forward and backward of the Function, as ``linear_grpo_loss`` and autograd call them."""
    rewards = None
    if signal == "rewards":
        rewards = make_group_rewards((given["rewards"], given["position"]), None, B, given["rewards"].device)
    advantages = given["upstream"] if signal == "advantages_N" else given["advantages"][given["sequence"]]
    tokens = TokenInputs(
        given["targets"],
        given["sequence"],
        given["weights"][given["sequence"]],
        None if rewards else advantages,
        rewards,
        given["old"] if old else None,
        given["ref"] if options.get("beta") else None,
        given["scale"] if scaled else None,
    )
    defaults = {
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "sapo_temperatures": (1.0, 1.05),
        "beta": 0.0,
        "kl_times_ratio": True,
    }
    checked = check_loss_options(loss_type=loss_type, **{**defaults, **options})
    sketched = []
    sketch = HeadSketch(given["projection"], sketched.append) if need[1] else None
    ctx = Context(needs_input_grad=[False] * 2 + need)
    head = (given[name] for name in ("hidden", "weight", "bias", "low_inputs", "low_weight"))
    transform = Transform(1.0, 1.0, softcap)
    call = LossCall(compute_dtype(given["hidden"]), tokens, transform, checked, entropy_coef / N, sketch)
    out = LinearGRPOLossFunction.forward(ctx, call, True, *head)
    return out, LinearGRPOLossFunction.backward(ctx, torch.full_like(out[0], 2.0)), sketched


@pytest.mark.parametrize("dtype", IN_PASSES, ids=str)
@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("case", LOSSES)
def test_both_passes_of_the_loss(case, need, dtype, device):
    given = {**inputs(dtype), "projection": inputs()["projection"].to(dtype)}
    with use_backend("torch"), torch.no_grad():
        expected = loss_passes(given, NEEDS[need], **LOSSES[case])
    far = away(given, device)
    with far_away(device):
        found = loss_passes(far, NEEDS[need], **LOSSES[case])
    assert_there(found, expected, device, **tolerance(dtype))


def logprob_passes(given, need, upstream):
    sketched = []
    sketch = HeadSketch(given["projection"], sketched.append) if need[1] else None
    ctx = Context(needs_input_grad=[False] * 6 + need)
    head = (given[name] for name in ("hidden", "weight", "bias", "low_inputs", "low_weight"))
    out = LinearLogprobFunction.forward(
        ctx, compute_dtype(given["hidden"]), given["targets"], Transform(0.9, 1.0, None), True, True, sketch, *head
    )
    gradients = [given["upstream"].to(out[0].dtype) if wanted else None for wanted in upstream]
    return out, LinearLogprobFunction.backward(ctx, *gradients), sketched


@pytest.mark.parametrize("dtype", IN_PASSES, ids=str)
@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("upstream", [(True, False), (True, True), (False, True)])
def test_both_passes_of_the_log_probs(upstream, need, dtype, device, launched):
    given = {**inputs(dtype), "projection": inputs()["projection"].to(dtype)}
    with use_backend("torch"), torch.no_grad():
        expected = logprob_passes(given, NEEDS[need], upstream)
    far = away(given, device)
    with far_away(device):
        found = logprob_passes(far, NEEDS[need], upstream)
    assert_there(found, expected, device, **tolerance(dtype))
    assert set(launched) == {"_softmax_rows_kernel", "_logit_gradient_kernel"}


SHAPES = {"lengths": (B, G), "function_rewards": (B, G, 2)}


@pytest.mark.parametrize("method", METHODS)
def test_normalisation(method, device, launched):
    rewards_PG = inputs()["rewards"]
    context = {
        name: torch.tensor(value).reshape(SHAPES.get(name, (-1,))) if isinstance(value, list) else value
        for name, value in context_of(method, rewards_PG.tolist()).items()
    }
    with use_backend("torch"):
        expected = normalize_with_statistics(rewards_PG, method, context=context, **method_options(method))
    rewards, context = away(rewards_PG, device), away(context, device)
    with far_away(device):
        found = normalize_with_statistics(rewards, method, context=context, **method_options(method))
    assert_there(found._asdict(), expected._asdict(), device)
    assert set(launched) == {"_normalize_kernel"}


def test_a_launch_makes_the_device_current_and_leaves_it(device):
    current, names = torch.cuda.device, []
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((grid, current.current, names))

    far = away(torch.ones(4), device)
    with far_away(device):
        launch(Kernel(), (3,), far, None, 2.0)
    assert seen == [((3,), device, [])] and current.current == torch.device("cuda:0")


def test_what_a_gpu_would_refuse_or_wait_for_is_seen(device):
    """The test can fail."""
    here, there = torch.ones(3), away(torch.ones(3), device)
    other = away(torch.ones(3), "cuda:0")
    for wrong in (lambda: here + there, lambda: there[:1] + other, lambda: torch.arange(3), lambda: there.cpu()):
        with (
            far_away(device),
            pytest.raises(AssertionError, match=r"on tensors of|makes a CPU tensor|everything is on"),
        ):
            wrong()
    with far_away(device):
        assert (there + torch.tensor(1.0)).sum().item() == 6.0
        assert torch.zeros(2, device=device).device == there.new_zeros(2).device == device


def test_sketches_of_a_layer(device):
    """Signs are made where they are used, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    d, a = torch.randn(2, 5, 30, generator=generator), torch.randn(2, 5, 20, generator=generator)
    words = torch.randn(2, 5, V, generator=generator)
    sequence_RT = torch.tensor([[0, 0, 1, 1, -1], [2, 2, 2, -1, -1]])

    def sketch(where, d, a, words, sequence_RT, prompt_S):
        projections = Projections(4, 3, where, [(30, 20), (30,), (V, 20)])
        found = []
        for rows in (SequenceRows(prompt_S[:2], None, 2), SequenceRows(prompt_S, sequence_RT, 2)):
            left, right = projections.fold_side(d, "out", 0), projections.fold_side(a, "in", 0)
            place = projections.place(0, left.shape[-1], right.shape[-1])
            turn = lambda sums: projections.turn_narrow(sums, 0)  # noqa: E731
            rows.add_outer("model", left, right, projections.side, place, turn)
            rows.add("model", projections.fold_vector(rows.sums(d), 1))
            for entries in rows.entries.values():
                rows.add("model", projections.fold_entries(entries))
            projected = words @ projections.vocabulary(V, 2, words.dtype)
            found += [rows.total["model"], *projections.split_vocabulary(projected)]
        return found

    given = (d, a, words, sequence_RT, torch.tensor([7, 7, 8]))
    expected = sketch(torch.device("cpu"), *given)
    far = away(given, device)
    with far_away(device, cpu_is_fine=True):
        found = sketch(device, *far)
    assert_there(found, expected, device)


def test_figures_of_a_step(device):
    """Interference, curvature, the sketch's error: numbers, whatever the device."""
    generator = torch.Generator().manual_seed(0)
    sketch_BMK = torch.randn(8, 2, 50, generator=generator)
    flat = sketch_BMK.flatten(1).double()
    tensors = {
        "gram_BB": flat @ flat.T,
        "prompt_B": torch.arange(8) // 4,
        "coefficient_B": torch.randn(8, generator=generator),
        "reward_B": torch.randint(2, (8,), generator=generator).float(),
    }

    def figures(sketch_BMK, tensors):
        step = StepGradients(**tensors, baseline_size=4)
        rmse = predicted_rmse(sketch_BMK, step.prompt_B)
        metrics = interference_metrics(step, sketch_rmse=rmse, features_PP=sketch_BMK[:2, 0] @ sketch_BMK[:2, 0].T)
        return metrics, directional_curvature(step), fisher_trace(step)

    expected = figures(sketch_BMK, tensors)
    assert len(expected[0]) > 15
    far = away((sketch_BMK, tensors), device)
    with far_away(device, cpu_is_fine=True):  # eigenvalues of small matrices
        found = figures(*far)
    assert_there(found, expected, device)
