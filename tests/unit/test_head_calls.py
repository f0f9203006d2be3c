"""What a call of the fused head costs, keeps and refuses: products counted, autograd, threads, bad input."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from head_example import OFF_POLICY, example, gradients_of, our_gradients, ours
from kernel_inputs import BACKENDS
from reference import grpo_loss, head_logprobs
from torch.utils.flop_counter import FlopCounterMode

from grpo_kernels import linear_grpo_loss, linear_logprob, use_backend
from grpo_kernels.head.products import HeadSketch


def counted(function, n, h, v):
    """Floating-point operations of the matrix products, in units of N V H."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / (n * v * h)


@pytest.mark.parametrize("live", [1.0, 0.5, 0.125, 0.0])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("by", ["advantage", "weight", "clip"])
def test_products_are_counted(live, frozen, by):
    n, h, v, b = 64, 16, 640, 16
    torch.manual_seed(0)
    hidden = torch.randn(n, h, requires_grad=True)
    weight = torch.randn(v, h, requires_grad=not frozen)
    targets, sequence = torch.randint(v, (n,)), torch.arange(n) % b
    dead = torch.arange(b) >= live * b
    advantages, weights, old = torch.ones(b), torch.ones(b), None
    if by == "advantage":
        advantages[dead] = 0
    elif by == "weight":
        weights[dead] = 0
    else:  # a ratio of e clips a positive advantage, one of 1 doesn't
        old = linear_logprob(hidden, weight, targets).detach() - dead[sequence].float()

    def run():
        linear_grpo_loss(hidden, weight, targets, sequence, advantages, weights, old_logprobs_N=old).loss.backward()

    assert counted(run, n, h, v) == pytest.approx(2 + (2 if frozen else 4) * live, abs=1e-9)


@pytest.mark.parametrize("live", [1.0, 0.25])
def test_products_of_logprob_are_counted(live):
    n, h, v = 64, 16, 640
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    targets = torch.randint(v, (n,))
    upstream = (torch.arange(n) < live * n).float()

    def run(weight):
        (linear_logprob(hidden, weight, targets) * upstream).sum().backward()

    assert counted(lambda: run(weight), n, h, v) == 2 + 6 * live
    assert counted(lambda: run(weight.detach()), n, h, v) == 4  # kept from the forward; the backward is a row scale
    with torch.no_grad():
        assert counted(lambda: linear_logprob(hidden, weight, targets), n, h, v) == 2


def test_calls_of_all_sizes_and_threads_share_no_memory_they_need():
    """The tile's memory is kept between calls: larger, smaller and other dtypes after one another, and two threads."""
    cases = [(5, 3000, torch.float32), (40, 20, torch.float64), (64, 9000, torch.bfloat16), (3, 2, torch.float32)] * 2
    inputs = [example(n=n, v=v, dtype=dtype, seed=n) for n, v, dtype in cases]

    def run(case):
        out = ours(*case)
        return {"loss": out.loss.detach(), **gradients_of(out.loss, case[0])}

    alone = [run(case) for case in inputs]
    with ThreadPoolExecutor(2) as pool:
        torch.testing.assert_close(list(pool.map(run, inputs)), alone, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bit_equal(dtype, backend):
    n, v = (300, 2000) if backend == "torch" else (40, 200)
    tensors, data = example(n=n, h=64, v=v, dtype=dtype, b=6)
    with use_backend(backend):
        first, second = (ours(tensors, data, OFF_POLICY["all"]) for _ in range(2))
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("loss", "logprobs", "entropies"))
    expected = gradients_of(first.loss, tensors)
    torch.testing.assert_close(gradients_of(second.loss, tensors), expected, rtol=0, atol=0)


def test_no_grad_and_frozen_everything():
    tensors, data = example(dtype=torch.float32)
    with torch.no_grad():
        assert not ours(tensors, data).loss.requires_grad
    frozen = {name: tensor.detach() for name, tensor in tensors.items()}
    assert not ours(frozen, data).loss.requires_grad
    assert not linear_logprob(frozen["hidden"], frozen["weight"], data["targets"]).requires_grad


def test_backward_is_scaled_and_can_be_repeated_with_retain_graph():
    tensors, data = example(dtype=torch.float32)
    out = ours(tensors, data)
    torch.autograd.grad(out.loss, tensors["hidden"], retain_graph=True)
    (3 * out.loss).backward()
    torch.testing.assert_close(tensors["hidden"].grad, our_gradients(tensors, data)["hidden"] * 3)
    with pytest.raises(RuntimeError, match="was called before, without retain_graph"):
        out.loss.backward()


def test_tied_embeddings_get_both_gradients():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(11, 4).double()
    head = (embedding(torch.tensor([1, 2, 3])), embedding.weight, torch.tensor([2, 3, 10]))
    of_sequences = (torch.tensor([0, 0, 1]), torch.tensor([1.0, -1.0]).double(), torch.ones(2).double())
    losses = linear_grpo_loss(*head, *of_sequences).loss, grpo_loss(*head_logprobs(*head), *of_sequences)
    found, expected = (torch.autograd.grad(loss, embedding.weight, retain_graph=True) for loss in losses)
    torch.testing.assert_close(found, expected)


def test_inside_a_compiled_backbone():
    torch.manual_seed(0)
    body = torch.nn.Linear(6, 6)
    weight = torch.randn(13, 6)
    targets = torch.randint(13, (9,))

    @torch.compile(backend="eager")
    def step(x):
        return linear_logprob(torch.tanh(body(x)), weight, targets).sum()

    x = torch.randn(9, 6)
    got = torch.autograd.grad(step(x), body.weight)[0]
    logprobs, _ = head_logprobs(torch.tanh(body(x)), weight, targets)
    torch.testing.assert_close(got, torch.autograd.grad(logprobs.sum(), body.weight)[0])


def call(**changes):
    arguments = {
        "hidden_NH": torch.zeros(4, 3),
        "weight_VH": torch.zeros(5, 3),
        "targets_N": torch.zeros(4, dtype=torch.long),
        "sequence_N": torch.zeros(4, dtype=torch.long),
        "advantages": torch.zeros(2),
        "weights_B": torch.zeros(2),
    }
    return linear_grpo_loss(**{**arguments, **changes})


def rewarded(table=((0.0, 0.0), (0.0, 0.0)), position=(0, 1), **more):
    return {"advantages": None, "rewards": (torch.tensor(table), torch.tensor(position)), **more}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_NH": torch.zeros(4, 2)}, r"hidden \(4, 2\) and weight \(5, 3\) don't fit"),
        ({"hidden_NH": torch.zeros(1, 4, 3), "targets_N": torch.zeros(1, 4).long()}, r"hidden_NH has shape \(1, 4"),
        ({"weight_VH": torch.zeros(0, 3)}, "the vocabulary is empty"),
        ({"weight_VH": torch.zeros(5, 3, dtype=torch.int32)}, "weight has dtype torch.int32"),
        ({"hidden_NH": torch.zeros(4, 3, device="meta")}, "they must be on one device"),
        ({"targets_N": torch.tensor([0, 5, 0, 0])}, r"targets hold 5: expected values in \[0, 5\)"),
        ({"targets_N": torch.tensor([0, -1, 0, 0])}, "targets hold -1"),
        ({"targets_N": torch.zeros(3, dtype=torch.long)}, r"targets have shape \(3,\)"),
        ({"targets_N": torch.zeros(4)}, "targets have dtype torch.float32"),
        ({"sequence_N": torch.tensor([0, 1, 2, 0])}, r"sequence_N holds 2: expected values in \[0, 2\)"),
        ({"sequence_N": torch.zeros(3, dtype=torch.long)}, "sequence_N must be an integer tensor"),
        ({"weights_B": torch.zeros(2, dtype=torch.long)}, "weights_B must be a floating-point tensor"),
        ({"advantages": torch.zeros(3)}, r"advantages are \(3,\) of torch.float32: expected \(2,\) or \(4,\)"),
        ({"advantages": None}, "give one of advantages, advantages_N and rewards, got none"),
        ({"advantages_N": torch.zeros(4)}, "got advantages, advantages_N"),
        ({"advantages": None, "advantages_N": torch.zeros(3)}, r"advantages_N is \(3,\)"),
        ({"hidden_NH": [[1.0]]}, "hidden must be a tensor, got list"),
        ({"hidden_NH": torch.zeros(4, 0), "weight_VH": torch.zeros(5, 0)}, "its last dimension must be at least 1"),
        ({"weight_VH": torch.zeros(5, 3).to_sparse()}, "dense floats"),
        ({"bias": [0.0] * 5}, "bias must be a tensor, got list"),
        ({"low_rank": (1, 2)}, "low_rank must be a pair of tensors"),
        ({"loss_type": ["grpo"]}, r"loss_type=\['grpo'\]"),
        ({"sequence_N": torch.zeros(4, dtype=torch.bool)}, "sequence_N must be an integer tensor"),
        ({"entropy_coef": True}, "entropy_coef=True"),
        ({"rewards": (torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))}, "got advantages, rewards"),
        ({"advantages": None, "rewards": (torch.zeros(3, 2), torch.zeros(3).long())}, r"expected \(2, G\)"),
        (rewarded(position=[0, 2]), r"rewards\[1\] holds 2: expected values"),
        (rewarded([[1.0, math.inf]] * 2), r"rewards\[0\]\[0, 1\] is inf"),
        (rewarded(normalization="std"), r"normalization='std' must be a pair: \(method, options\)"),
        (rewarded(normalization=("std", {"method": 1})), "the method comes first, options after it"),
        (rewarded(normalization=("global", {})), "'global' needs more than its own group"),
        ({"normalization": ("std", {})}, "goes with rewards"),
        ({"loss_type": "gspo"}, "loss_type='gspo': choose from grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo"),
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number above 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"float32_logits": 1}, "float32_logits=1 must be True or False"),
        ({"epsilon": -0.1}, "epsilon=-0.1 must be a finite number of at least 0"),
        ({"epsilon": 1.5}, r"epsilon=1.5 must be in \[0, 1\]"),
        ({"epsilon_high": math.inf}, "epsilon_high=inf"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"beta": 0.1}, "beta=0.1 needs ref_logprobs_N"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"sapo_temperatures": (1.0,)}, "must be two numbers"),
        ({"sapo_temperatures": (1.0, 0.0)}, r"sapo_temperatures\[1\]=0.0"),
        ({"entropy_coef": math.nan}, "entropy_coef=nan"),
        ({"old_logprobs_N": torch.zeros(3)}, r"old_logprobs_N is \(3,\) of torch.float32: expected \(4,\)"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\): expected \(5,\)"),
        ({"low_rank": (torch.zeros(4, 2), torch.zeros(5, 3))}, "low_rank has shapes"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_asking_for_triton_where_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use_backend("triton"), pytest.raises(ValueError, match="asked for on device cpu"):
        call(weights_B=torch.ones(2), advantages=torch.ones(2))


def test_head_sketch_of_the_fused_losses():
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(33, 16, requires_grad=True)
    targets, sequence = torch.randint(0, 33, (7,)), torch.tensor([0, 0, 1, 1, 1, 2, 2])
    advantages, weights = torch.tensor([1.0, 0.0, -2.0]), torch.full((3,), 0.5)
    logits = (hidden @ weight.T).detach().requires_grad_()

    def scaled_loss(logp):
        return -3 * 0.5 * (advantages[sequence] * (logp - logp.detach()).exp()).sum()

    scaled_loss(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]).backward()
    for projection in (None, torch.randn(33, 5)):
        want = logits.grad if projection is None else logits.grad @ projection
        got = []
        head = {"head_sketch": HeadSketch(projection, got.append)}
        (3 * linear_grpo_loss(hidden, weight, targets, sequence, advantages, weights, **head).loss).backward()
        scaled_loss(linear_logprob(hidden, weight, targets, **head)).backward()
        torch.testing.assert_close(got, [want, want], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"head_sketch.projection has shape \(32, 5\): expected \(33, k\)"):
        linear_logprob(hidden, weight, targets, head_sketch=HeadSketch(torch.randn(32, 5), got.append))
    with pytest.raises(ValueError, match="weight doesn't require a gradient"):
        linear_logprob(hidden, weight.detach(), targets, head_sketch=HeadSketch(None, got.append))
