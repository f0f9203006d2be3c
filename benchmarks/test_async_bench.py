"""One packed row of the asynchronous trainer: TRL's loss with its own head, ours, and the head's bare products.

2000 positions of which 60 % are trained, hidden 896, vocabulary 32768, float32; 1200 tokens of the loss, or 1600 of
which 400 share their position with another.

Predicted before the first run, from products counted and from what test_head_bench measured at 512 tokens (N tokens of
the loss on U labelled positions of S; in units of V H): trainable, TRL 8 S on a CPU and 8 U on a GPU, ours 6 N, or 8 U
with ``linear_logprob``; frozen, TRL 6 S or 6 U, ours 4 N or 4 U.

    trainable, N = U     TRL / ours 3.7, TRL labelled / ours 2.2, ours / floor 1.2
    frozen, N = U        TRL / ours 4.5, TRL labelled / ours 2.7, ours / floor 1.15
    trainable, N = 4/3 U loss kernel / log-prob kernel 1.0
    frozen, N = 4/3 U    loss kernel / log-prob kernel 1.3
    peak memory          ours / TRL 0.3

Measured: README.md.
"""

import async_contenders as rows
import pytest
import torch
from compare import in_fresh_process

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = "Qwen2.5"  # its hidden size


def name_of(frozen, tokens_a_position):
    share = "one token a position" if tokens_a_position == 1 else f"{tokens_a_position:.2f} tokens a position"
    return f"packed row {'frozen   ' if frozen else 'trainable'} {share}"


def floor(trainer, inputs):
    """The products of the labelled positions alone, into buffers that are there."""
    weight = trainer.model.lm_head.weight.detach()
    hidden = torch.randn(int((inputs["shift_labels"] >= 0).sum()), weight.shape[1], device=weight.device)
    logits, hidden_grad = hidden @ weight.T, torch.zeros_like(hidden)
    weight_grad = torch.zeros_like(weight) if trainer.model.lm_head.weight.requires_grad else None

    def call():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=hidden_grad)
        if weight_grad is not None:
            torch.mm(logits.T, hidden, out=weight_grad)

    return call


def calls_of(trainer, inputs, names):
    """The contenders, which leave the same gradient, and the floor."""
    calls = {name: rows.backward(name, trainer, inputs) for name in names}
    gradients = {}
    for name in names if trainer.model.lm_head.weight.requires_grad else ():
        calls[name]()
        gradients[name] = trainer.model.lm_head.weight.grad.clone()
        error = (gradients[name] - gradients[names[0]]).norm() / gradients[names[0]].norm()
        assert error < 1e-4, (name, error)
    return {**calls, "floor": floor(trainer, inputs)}


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, True])
def test_a_packed_row(compare, frozen):
    trainer = rows.make_trainer(SHAPE, rows.VOCABULARY, frozen=frozen, device=DEVICE)
    calls = calls_of(trainer, rows.make_inputs(rows.VOCABULARY, device=DEVICE), ["TRL", "TRL, labelled", "ours"])
    values = {"TRL / ours": ("TRL", "ours"), "TRL labelled / ours": ("TRL, labelled", "ours")}
    compare("head", name_of(frozen, 1), calls, values | {"ours / floor": ("ours", "floor")}, rounds=5)


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, True])
def test_shared_positions(compare, frozen, tokens_a_position=4 / 3):
    trainer = rows.make_trainer(SHAPE, rows.VOCABULARY, frozen=frozen, device=DEVICE)
    inputs = rows.make_inputs(rows.VOCABULARY, tokens_a_position=tokens_a_position, device=DEVICE)
    kernels = ["ours, loss kernel", "ours, log-prob kernel"]
    values = {"loss kernel / log-prob kernel": tuple(kernels), "TRL labelled / ours": ("TRL, labelled", "ours")}
    calls = calls_of(trainer, inputs, [*kernels, "TRL, labelled", "ours"])
    compare("head", name_of(frozen, tokens_a_position), calls, values, rounds=5)


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, True])
def test_peak_memory(benchmark, record, frozen):
    """Beyond inputs and the head's gradient, each contender in a fresh process."""
    theirs = {name: in_fresh_process(rows.peak, name, SHAPE, frozen) for name in ("TRL", "TRL, labelled")}
    peak = benchmark.pedantic(in_fresh_process, args=(rows.peak, "ours", SHAPE, frozen), rounds=1)
    values = {"ours MiB": peak / 2**20, "TRL MiB": theirs["TRL"] / 2**20, "ours / TRL": peak / theirs["TRL"]}
    values["ours / TRL labelled"] = peak / theirs["TRL, labelled"]
    record("head", f"{name_of(frozen, 1)} peak memory", values)
