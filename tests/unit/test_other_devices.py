"""On a second GPU, or any: every tensor that is made or launched is on the device of the inputs, which is current.

No GPU is needed (``far_tensors.py``): public functions, and forward and backward of both autograd Functions, run on
tensors that say they are on ``cuda:1``, kernels interpreted, and give the CPU's values. Autograd itself
can't be run so (torch without CUDA aborts), and with it the trainer's path: that is left to ``make gpu``, test_gpu.py.
"""

from types import SimpleNamespace

import pytest
import torch
from far_tensors import CurrentDevice, Far, InterpretedKernel, far_away, near
from kernel_inputs import INTERPRETED, V, context_tensors, head_inputs, method_options, signal_of
from normalize_example import IN_KERNEL
from torch.utils._pytree import tree_flatten, tree_map_only

from grpo_kernels import linear_grpo_loss, linear_logprob, normalize_with_statistics, use_backend
from grpo_kernels.head.linear_grpo_loss import LinearGRPOLossFunction
from grpo_kernels.head.linear_logprob import LinearLogprobFunction
from grpo_kernels.head.products import HeadSketch
from grpo_kernels.head.rows import triton_rows
from grpo_kernels.interference.curvature import directional_curvature, fisher_trace
from grpo_kernels.interference.layer_taps import Layer
from grpo_kernels.interference.metrics import interference_metrics
from grpo_kernels.interference.projections import Projections
from grpo_kernels.interference.sequence_rows import SequenceRows
from grpo_kernels.interference.sketch_error import predicted_rmse
from grpo_kernels.interference.step_gradients import StepGradients
from grpo_kernels.launch import launch
from grpo_kernels.normalize import triton_groups

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


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


def assert_same_there(call, given, device, *, cpu_is_fine=False, rtol=1e-4, atol=1e-5):
    """What ``call(given)`` returns on ``device`` is there, with the CPU's values, which are returned."""
    with use_backend("torch"), torch.no_grad():
        expected = call(given)
    far = away(given, device)
    with far_away(device, cpu_is_fine=cpu_is_fine):
        found = call(far)
    found, there = tree_flatten(found)[0], tree_flatten(expected)[0]
    assert len(found) == len(there)
    for mine, its in zip(found, there, strict=True):
        if isinstance(its, torch.Tensor):
            assert mine.device == device
            torch.testing.assert_close(near(mine), its, rtol=rtol, atol=atol, equal_nan=True)
        else:
            assert mine == (its if its is None else pytest.approx(its, rel=1e-9))
    return expected


# ---- the head


class Context(SimpleNamespace):
    """Stands for what autograd gives ``forward`` and ``backward``."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


GRAD_ENABLED = {LinearGRPOLossFunction: 1, LinearLogprobFunction: 2}  # its place among the arguments
NEEDS = {
    "no gradient": [False] * 5,
    "all": [True] * 5,
    "frozen head": [True, False, False, True, False],
    "adapter": [True, False, False, True, True],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PASSES = [("no gradient", dtype) for dtype in DTYPES]
# float16 has a unit of its own
PASSES += [(need, dtype) for need in list(NEEDS)[1:] for dtype in (torch.float32, torch.float16)]


@pytest.fixture(params=PASSES, ids=lambda one: f"{one[0]}-{one[1]}")
def passes(request, monkeypatch):
    """Runs both passes of a Function as autograd would, where a public function calls ``apply``."""
    need, dtype = NEEDS[request.param[0]], request.param[1]

    def both(call, given, upstream):
        """What ``call`` returns of ``given`` and a sketch, the gradients, and what was sketched."""
        gradients, sketched = [], []

        def apply(function, *arguments):
            ctx = Context(needs_input_grad=[False] * (len(arguments) - 5) + need)
            place = GRAD_ENABLED[function]
            out = function.forward(ctx, *arguments[:place], any(need), *arguments[place + 1 :])
            if any(need):
                gradients.extend(function.backward(ctx, *upstream(out)))
                assert bool(sketched) == need[1]
            return out

        for function in GRAD_ENABLED:
            monkeypatch.setattr(function, "apply", lambda *arguments, function=function: apply(function, *arguments))
        weight = given["weight_VH"].detach().requires_grad_(need[1])
        sketch = HeadSketch(given["projection"], sketched.append) if need[1] else None
        return call({**given, "weight_VH": weight}, sketch), gradients, sketched

    both.dtype, both.need = dtype, need
    both.tolerance = {"rtol": 0.05, "atol": 0.05} if dtype.itemsize == 2 else {}
    return both


def inputs(dtype):
    """Some advantages are 0, and some groups' rewards all equal."""
    given = head_inputs(dtype)
    rounded = {name: given[name].round() for name in ("advantages", "advantages_N")}
    return {**given, **rounded, "rewards": (given["rewards"] > -0.5).float()}


OLD, REF, SCALE = "old_logprobs_N", "ref_logprobs_N", "policy_scale_N"
# the signal, which other tensors of tokens, and options
LOSSES = {
    "on policy": ("advantages", [], {}),
    "clipped": ("advantages_N", [OLD], {}),  # rows without a gradient leave the tile
    "off policy": ("advantages_N", [OLD, REF], {"loss_type": "dapo", "beta": 0.1, "delta": 1.5}),
    "rewards": ("rewards", [OLD, SCALE], {"loss_type": "cispo"}),
    "entropy": ("rewards", [], {"loss_type": "sapo", "entropy_coef": 0.01, "softcap": 5.0}),
}


@pytest.mark.parametrize("case", LOSSES)
def test_linear_grpo_loss(case, passes, device, launched):
    signal, names, options = LOSSES[case]
    names = ["hidden_NH", "weight_VH", "targets_N", "sequence_N", "weights_B", "bias", *names]

    def call(given, sketch):
        arguments = {**signal_of(given, signal), **{name: given[name] for name in names}}
        low_rank = (given["low_inputs"], given["low_weight"])
        return vars(linear_grpo_loss(**arguments, low_rank=low_rank, head_sketch=sketch, **options))

    def run(given):
        return passes(call, given, lambda out: [torch.full_like(out[0], 2.0)])

    assert_same_there(run, inputs(passes.dtype), device, **passes.tolerance)
    assert ("_grpo_rows_kernel" in launched) == (passes.dtype != torch.float64)


@pytest.mark.parametrize("upstream", [(True, False), (True, True), (False, True)])
def test_linear_logprob(upstream, passes, device, launched):
    def call(given, sketch):
        arguments = (given["hidden_NH"], given["weight_VH"], given["targets_N"])
        low_rank = (given["low_inputs"], given["low_weight"])
        options = {"bias": given["bias"], "low_rank": low_rank, "temperature": 0.9, "head_sketch": sketch}
        return linear_logprob(*arguments, entropy=upstream != (True, False) or any(passes.need), **options)

    def run(given):
        gradient_N = given["advantages_N"]
        return passes(call, given, lambda out: [gradient_N.to(out[0].dtype) if wanted else None for wanted in upstream])

    assert_same_there(run, inputs(passes.dtype), device, **passes.tolerance)
    kernels = {"_softmax_rows_kernel"} | ({"_logit_gradient_kernel"} if any(passes.need) else set())
    assert set(launched) == (kernels if passes.dtype != torch.float64 else set())


# ---- the rest


@pytest.mark.parametrize("method", IN_KERNEL)
def test_normalisation(method, device, launched):
    rewards_PG = inputs(torch.float32)["rewards"]

    def call(given):
        rewards_PG, context = given
        return normalize_with_statistics(rewards_PG, method, context=context, **method_options(method))._asdict()

    assert_same_there(call, (rewards_PG, context_tensors(method, rewards_PG)), device)
    assert set(launched) == {"_normalize_kernel"}


def test_a_launch_makes_the_device_current_and_leaves_it(device):
    current, seen = torch.cuda.device, []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((grid, current.current))

    far = away(torch.ones(4), device)
    with far_away(device):
        launch(Kernel(), (3,), far, None, 2.0)
    assert seen == [((3,), device)] and current.current == torch.device("cuda:0")


def test_mixed_devices_and_hidden_copies_are_caught(device):
    """The test can fail."""
    here, there = torch.ones(3), away(torch.ones(3), device)
    other = away(torch.ones(3), "cuda:0")
    for wrong in (lambda: here + there, lambda: there[:1] + other, lambda: torch.arange(3), lambda: there.cpu()):
        refused = pytest.raises(AssertionError, match=r"on tensors of|makes a CPU tensor|everything is on")
        with far_away(device), refused:
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

    def sketch(given):
        d, a, words, sequence_RT, prompt_S = given
        projections = Projections(4, 3, d.device, [(30, 20), (30,), (V, 20)])
        found = []
        for rows in (SequenceRows(prompt_S[:2], None, 2), SequenceRows(prompt_S, sequence_RT, 2)):
            projections.outer(rows, [Layer("", torch.nn.Identity(), "linear", 0, None, section="model")], [d], [a])
            projections.vectors(rows, "model", [1], rows.sums(d)[None])
            for entries in rows.entries.values():
                rows.add("model", projections.fold_entries(entries))
            projected = words @ projections.vocabulary(V, 2, words.dtype)
            found += [rows.total["model"], *projections.split_vocabulary(projected)]
        return found

    given = (d, a, words, sequence_RT, torch.tensor([7, 7, 8]))
    assert_same_there(sketch, given, device, cpu_is_fine=True)


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

    def figures(given):
        sketch_BMK, tensors = given
        step = StepGradients(**tensors, baseline_size=4)
        rmse = predicted_rmse(sketch_BMK, step.prompt_B)
        metrics = interference_metrics(step, sketch_rmse=rmse, features_PP=sketch_BMK[:2, 0] @ sketch_BMK[:2, 0].T)
        return metrics, directional_curvature(step), fisher_trace(step)

    # eigenvalues of small matrices are the CPU's
    metrics, *_ = assert_same_there(figures, (sketch_BMK, tensors), device, cpu_is_fine=True)
    assert len(metrics) > 15
