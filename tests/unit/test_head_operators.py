"""The head inside ``torch.compile``: one operator, no graph break, and the numbers of a call outside."""

import pytest
import torch
import torch._dynamo.testing
from head_example import example, gradients_of, ours

from grpo_kernels import linear_grpo_loss, linear_logprob
from grpo_kernels.head import loss_operator
from grpo_kernels.head.logprob_operator import logprob_backward_operator, logprob_operator
from grpo_kernels.head.products import HeadSketch

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
FROZEN = {"trained": (), "frozen": ("weight", "bias"), "nothing": ("hidden", "weight", "bias")}


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def low_rank(n, v, dtype):
    torch.manual_seed(5)
    return tuple(torch.randn(size, 3).to(dtype).requires_grad_() for size in (n, v))


def inputs(dtype, frozen=(), adapter=False, n=24):
    tensors, data = example(n, dtype=dtype)
    for name in frozen:
        tensors[name].requires_grad_(False)
    if adapter:
        tensors |= dict(zip(("low_inputs", "low_weight"), low_rank(n, 37, dtype), strict=True))
    return tensors, data


def loss_and_gradients(call, tensors, data, adapter, **options):
    head = {"low_rank": (tensors["low_inputs"], tensors["low_weight"])} if adapter else {}
    found = call(tensors, data, options, head)
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    return found, gradients_of(2.5 * found.loss, wanted) if wanted else {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("options", [{}, {"beta": 0.05, "entropy_coef": 0.1, "delta": 1.8}], ids=["clip", "all"])
def test_the_compiled_loss_is_equal(options, frozen, dtype):
    adapter = bool(options) and frozen != "nothing"
    tensors, data = inputs(dtype, FROZEN[frozen], adapter)
    want, want_gradients = loss_and_gradients(ours, tensors, data, adapter, **options)
    got, gradients = loss_and_gradients(compiled(ours), tensors, data, adapter, **options)
    for name, value in vars(want).items():
        assert value is None or torch.equal(getattr(got, name), value), name
    assert all(torch.equal(gradients[name], gradient) for name, gradient in want_gradients.items())


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_log_probs_are_equal(dtype, frozen, entropy):
    tensors, data = inputs(dtype, FROZEN[frozen])
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}

    def call(tensors, targets):
        found = linear_logprob(
            tensors["hidden"], tensors["weight"], targets, bias=tensors["bias"], entropy=entropy, softcap=30.0
        )
        return found if entropy else (found,)

    def run(function):
        found = function(tensors, data["targets"])
        loss = sum((torch.arange(len(x)) % 3 * x).sum() for x in found)
        return [*found, *(gradients_of(loss, wanted).values() if wanted else ())]

    for got, want in zip(run(compiled(call)), run(call), strict=True):
        assert torch.equal(got, want)


def test_rewards_and_autocast_go_into_the_graph():
    tensors, data = inputs(torch.float32)
    rewards = (torch.rand(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0]))

    def call(hidden, weight):
        with torch.autocast("cpu", torch.bfloat16):
            found = linear_grpo_loss(
                hidden, weight, data["targets"], data["sequence"], None, data["weights"].float(), rewards=rewards
            )
        return found.loss, found.advantages

    assert all(
        map(torch.equal, compiled(call)(*pair), call(*pair)) for pair in [(tensors["hidden"], tensors["weight"])]
    )


def test_numbers_of_tokens_share_a_graph():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    call = torch.compile(ours, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for count in (24, 31, 17, 40):
        tensors, data = inputs(torch.float32, n=count)
        assert torch.equal(call(tensors, data).loss, ours(tensors, data).loss)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]  # not 1: Dynamo starts again where it has made a number dynamic for nothing


def test_second_derivatives_are_refused_in_a_graph_too():
    """A backend that keeps autograd as it is would else return some without their largest part."""
    tensors, data = inputs(torch.float64, FROZEN["frozen"])
    torch._dynamo.reset()
    found = torch.compile(ours, fullgraph=True, backend="eager")(tensors, data, {}, {})
    logprobs = torch.compile(linear_logprob, fullgraph=True, backend="eager")(
        tensors["hidden"], tensors["weight"], data["targets"]
    )
    for result in (found.loss, logprobs.sum()):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(result, tensors["hidden"], create_graph=True)


def test_wrong_values_are_named_in_a_graph():
    tensors, data = inputs(torch.float32)
    data["targets"][3] = 37
    with pytest.raises(ValueError, match="targets hold 37"):
        compiled(ours)(tensors, data)


def test_a_logged_step_runs_outside_of_the_graph():
    tensors, data = inputs(torch.float32)

    def projected(function):
        found = []
        sketch = HeadSketch(torch.ones(37, 2), found.append)
        function(tensors, data, {"head_sketch": sketch}).loss.backward()
        return found[0]

    torch._dynamo.reset()
    assert torch.equal(projected(torch.compile(ours, backend="aot_eager")), projected(ours))


@pytest.mark.parametrize("frozen", ["trained", "frozen"])
def test_opcheck(frozen, monkeypatch):
    """Schema, autograd registration, fake tensors, and AOT dispatch with static and dynamic shapes."""
    tensors, data = inputs(torch.float32, FROZEN[frozen], adapter=True)
    given = []
    real = loss_operator.loss_operator
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(loss_operator, "loss_operator", lambda *args: given.append(args) or real(*args))
        loss_and_gradients(ours, tensors, data, adapter=True, beta=0.1)
    torch.library.opcheck(real, given[0])
    operands = (tensors["hidden"], tensors["weight"], tensors["bias"], tensors["low_inputs"], tensors["low_weight"])
    needs = [operand.requires_grad for operand in operands]
    scalars = (torch.float32, 1.0, 1.0, None, True, True)
    torch.library.opcheck(logprob_operator, (*scalars, needs, data["targets"], *operands))
    upstream = torch.randn(2, len(data["targets"])).unbind()
    detached = [operand.detach() for operand in operands]
    torch.library.opcheck(logprob_backward_operator, (*upstream, *scalars, needs, data["targets"], *detached))
