"""GradientRecorder in plain loops of a small Llama, against one backward for each prompt."""

import json

import loop_worker
import pytest
import torch
from loop_worker import GROUP_B, loss_of, make_model, packed_loss, train_step
from processes import start

from grpo_kernels import GradientRecorder
from grpo_kernels.recorder.files import read_interference

TWO_MICRO_BATCHES = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]]
PROMPTS = (3, 7, 9)


def one_backward_for_each_prompt(model):
    """(P, P) inner products of the prompts' gradients."""
    rows = []
    for prompt in PROMPTS:
        model.zero_grad()
        loss_of(model, (GROUP_B == prompt).nonzero()[:, 0].tolist()).backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rows.append(torch.cat([parameter.grad.flatten() for parameter in trained]))
    gradient_PN = torch.stack(rows)
    return gradient_PN @ gradient_PN.T


def assert_same(found_PP, expected_PP, tolerance):
    assert (found_PP - expected_PP).norm() <= tolerance * expected_PP.norm()


@pytest.mark.parametrize("pack", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"checkpointing": True}, {"lora": True}, {"lora": True, "checkpointing": True}, {"tied": True}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_prompts_gradients_are_those_of_one_backward_each(options, pack):
    model = make_model(**options)
    recorder = GradientRecorder(model, every=1, dim=0)
    train_step(model, recorder, TWO_MICRO_BATCHES, pack)
    prompts, gram_PP = recorder.inner_products()
    assert tuple(prompts.tolist()) == PROMPTS
    assert_same(gram_PP, one_backward_for_each_prompt(model), 1e-5)
    metrics = recorder.metrics()
    assert metrics["interference/coverage"] == pytest.approx(1)
    assert metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-5)
    assert "what_if/std/cos" in metrics and "noise/within" in metrics


def test_a_packed_row_has_the_loss_of_its_answers():
    """Else the equality above would be of something else."""
    model = make_model()
    expected = loss_of(model, [0, 1, 2, 3])
    torch.testing.assert_close(packed_loss(model, [0, 1, 2, 3])[0], expected, rtol=1e-7, atol=1e-7)


def test_answers_that_are_assigned_to_the_wrong_prompt_change_the_result():
    """The comparison can fail."""
    model = make_model()
    recorder = GradientRecorder(model, every=1, dim=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_worker, "GROUP_B", GROUP_B.roll(1))
        train_step(model, recorder, TWO_MICRO_BATCHES)
    expected = one_backward_for_each_prompt(model)
    assert (recorder.inner_products()[1] - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_after_the_next_rows_is_right_or_named(reentrant, caplog):
    """Both micro-batches' losses in one backward. Reentrant checkpointing recomputes the first at the second's rows."""
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    recorder = GradientRecorder(model, every=1, dim=0)
    model.zero_grad()
    with recorder.step():
        losses = []
        for answers in ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]):
            recorder.rows(GROUP_B[answers], loop_worker.REWARD_B[answers], loop_worker.ADVANTAGE_B[answers])
            losses.append(loss_of(model, answers))
        sum(losses).backward()
    assert ("each backward must run before the next rows()" in caplog.text) is reentrant
    if reentrant:
        assert recorder.metrics() == {}
    else:
        assert_same(recorder.inner_products()[1], one_backward_for_each_prompt(model), 1e-5)


# of 5 and 7 answers, and in unequal numbers of micro-batches' rows: prompts are split between the ranks
HALVES = [[[0, 1, 2], [3, 4]], [[5, 6, 7, 8], [9, 10, 11]]]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_see_what_one_does(engine, tmp_path):
    started = start(2, loop_worker.run, str(tmp_path), engine, HALVES, None, folder=tmp_path)
    assert started.finish() == [0, 0], started.text()[-3000:]
    model = make_model()
    alone = GradientRecorder(model, every=1, dim=0)
    train_step(model, alone, [[*range(12)]])
    records = read_interference(tmp_path)
    assert [record.step for record in records] == [1, 2]
    for record in records:
        assert_same(torch.from_numpy(record.gram_PP).double(), one_backward_for_each_prompt(model), 1e-5)
        assert record.metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-5)
        assert record.metrics["interference/coverage"] == pytest.approx(1)
    both = [json.loads((tmp_path / f"metrics.{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0] == both[1]
    for name, value in alone.metrics().items():
        if not name.startswith(("noise/advised", "interference/alignment")):  # which draw by the order of answers
            assert both[0][0][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_failure_of_one_process_ends_the_logging_of_both(tmp_path):
    started = start(2, loop_worker.run, str(tmp_path), "ddp", HALVES, 1, folder=tmp_path)
    assert started.finish() == [0, 0], started.text()[-3000:]
    for rank in (0, 1):
        first, second = json.loads((tmp_path / f"metrics.{rank}.json").read_text())
        assert first and not second
    assert started.text().count("isn't logged from here on: it failed on another process") == 1
