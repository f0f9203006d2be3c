"""GradientRecorder in a training loop of plain torch, against gradients taken one sequence at a time."""

import copy
import json
import logging
import math
import pickle

import pytest
import torch
from torch import nn

from grpo_kernels import GradientRecorder
from grpo_kernels.recorder.files import read_interference


class Regression(nn.Module):
    """Rows of T positions, each sequence's loss the sum over them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


GROUP_B = torch.tensor([30, 30, -8, -8, 5, 5])
REWARD_B = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.5])
ADVANTAGE_B = torch.tensor([-1.0, 1.0, 0.5, 0.25, -0.5, 0.5])
X = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1))


def loss_of(model, rows):
    return (model(X[rows]).sin().sum((1, 2)) * ADVANTAGE_B[rows]).sum()


def train_step(recorder, model, **columns):
    """One step of two micro-batches."""
    model.zero_grad()
    with recorder.step():
        for rows in (slice(0, 4), slice(4, 6)):
            own = {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in columns.items()}
            recorder.rows(GROUP_B[rows], REWARD_B[rows], ADVANTAGE_B[rows], **own)
            loss_of(model, rows).backward()
    return recorder.metrics()


def separate(model):
    """(B, parameters) float64: the gradient of each sequence, by a backward of its own."""
    found = []
    for row in range(6):
        model.zero_grad()
        loss_of(model, slice(row, row + 1)).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    return torch.stack(found).double()


def test_inner_products_are_those_of_one_backward_for_each_prompt():
    model = Regression()
    recorder = GradientRecorder(model, every=1, dim=0)
    metrics = train_step(recorder, model)
    groups, gram_PP = recorder.inner_products()
    assert groups.tolist() == [-8, 5, 30]
    of_prompt = torch.stack([separate(model)[GROUP_B == group].sum(0) for group in groups])
    torch.testing.assert_close(gram_PP, of_prompt @ of_prompt.T, rtol=1e-5, atol=1e-6)
    assert metrics["interference/coverage"] == 1.0
    assert metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-5)
    assert metrics["interference/live_prompts"] == 3
    assert not any(module._forward_hooks for module in model.modules())


def test_a_sketch_has_cosines_within_its_predicted_error():
    model = Regression()
    recorder = GradientRecorder(model, every=1, dim=32)
    rmse = train_step(recorder, model)["interference/sketch_rmse"]
    groups, gram_PP = recorder.inner_products()
    of_prompt = torch.stack([separate(model)[GROUP_B == group].sum(0) for group in groups])

    def cosines(gram_PP):
        return gram_PP / gram_PP.diagonal().sqrt() / gram_PP.diagonal().sqrt()[:, None]

    error = float((cosines(gram_PP) - cosines(of_prompt @ of_prompt.T)).abs().max())
    assert 0 < rmse < 0.1 and error < 5 * rmse + 0.05


def test_every_nth_step_is_logged_and_a_resumed_run_goes_on():
    model = Regression()
    recorder = GradientRecorder(model, every=2, dim=8)
    assert [bool(train_step(recorder, model)) for _ in range(3)] == [True, False, True]
    resumed = GradientRecorder(model, every=2, dim=8)
    resumed.load_state_dict(recorder.state_dict())
    found = [train_step(one, model) for one in (recorder, resumed) for _ in range(2)]
    assert found[0] == found[2] == {} and found[1] == found[3] != {}
    assert resumed.state_dict() == recorder.state_dict()


def test_the_file_holds_the_step(tmp_path):
    model = Regression()
    recorder = GradientRecorder(model, every=2, dim=0)
    for _ in range(3):
        train_step(recorder, model)
        recorder.save(tmp_path, {30: "thirty"})
    records = read_interference(tmp_path)
    assert [record.step for record in records] == [1, 3]
    last = records[-1]
    own = separate(model)
    assert last.prompt_key_P.tolist() == [-8, 5, 30] and last.prompt_text_P == ["", "", "thirty"]
    torch.testing.assert_close(torch.from_numpy(last.gram_BB).double(), own @ own.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(last.reward_B).float(), REWARD_B)
    assert last.sigma_P.tolist() == pytest.approx([0.0, 0.25, 0.5]) and last.metrics == recorder.metrics()


def test_coefficients_bring_what_needs_scores():
    """Here u_i = A_i s_i, as the loss is linear in the advantage."""
    model = Regression()
    without = train_step(GradientRecorder(model, every=1, dim=0), model)
    metrics = train_step(GradientRecorder(model, every=1, dim=0), model, coefficients=ADVANTAGE_B)
    needs_scores = ("what_if/", "curvature/fisher")
    assert not [name for name in without if name.startswith(needs_scores)]
    assert metrics["curvature/fisher_trace_mean"] > 0
    own = separate(model)
    raw = torch.tensor([-0.5, 0.5, 0.0, 0.0, -0.25, 0.25]).double()  # rewards less their mean
    other = (own * (raw / ADVANTAGE_B)[:, None]).sum(0)
    cos = float(torch.nn.functional.cosine_similarity(-other, own.sum(0), dim=0))
    assert abs(metrics["what_if/mean/cos"]) == pytest.approx(abs(cos), abs=1e-4)


def test_a_partial_group_is_left_out_of_group_statistics(tmp_path):
    model = Regression()
    recorder = GradientRecorder(model, every=1, dim=0)
    size = torch.tensor([2, 2, 2, 2, 4, 4])
    metrics = train_step(recorder, model, group_size=size, coefficients=ADVANTAGE_B)
    recorder.save(tmp_path)
    record = read_interference(tmp_path)[0]
    assert metrics["interference/partial_groups"] == 1 and metrics["interference/live_prompts"] == 3
    assert not any(name.startswith(("what_if/", "noise/")) for name in metrics)
    assert math.isnan(record.sigma_P[1]) and record.sigma_P[2] == pytest.approx(0.5)
    assert recorder.statistics.speedup.value() is None


def test_packed_rows_are_as_rows_of_their_own():
    """By cu_seqlens, and by a table with padding; a model without attention sees no difference."""
    model = Regression()
    lengths = [4, 1, 3, 2, 4, 4]
    row = torch.cat([one[:n] for one, n in zip(X, lengths, strict=True)])[None]
    borders = torch.tensor([0, *lengths]).cumsum(0)
    segment_1T = torch.arange(6).repeat_interleave(torch.tensor(lengths))[None]
    padded = torch.cat([row, torch.ones(1, 3, 6)], 1)
    table = torch.nn.functional.pad(segment_1T, (0, 3), value=-1)
    separate_rows = []
    for number in range(6):
        model.zero_grad()
        (model(row[:, segment_1T[0] == number]).sin().sum() * ADVANTAGE_B[number]).backward()
        separate_rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    of_prompt = torch.stack([torch.stack(separate_rows)[GROUP_B == group].sum(0) for group in (-8, 5, 30)])
    listed = torch.stack([table, torch.full_like(table, -1)], 2)
    for x, given in ((row, {"cu_seqlens": borders}), (padded, {"segments": table}), (padded, {"segments": listed})):
        recorder = GradientRecorder(model, every=1, dim=0)
        model.zero_grad()
        with recorder.step():
            recorder.rows(GROUP_B, REWARD_B, ADVANTAGE_B, **given)
            weight = ADVANTAGE_B[segment_1T[0]]
            (model(x)[0, : len(weight)].sin().sum(1) * weight).sum().backward()
        torch.testing.assert_close(recorder.inner_products()[1], of_prompt @ of_prompt.T, rtol=1e-5, atol=1e-6)
        assert recorder.metrics()["interference/sketch_check"] == pytest.approx(1, abs=1e-5)


SHARED = torch.tensor([[[0, 1], [0, -1], [1, -1]]])
TWO = ([1, 2], [0.0, 1.0], [1.0, 1.0])


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        (TWO, {"segments": SHARED}, "a prefix that several answers share is the sum of theirs"),
        (TWO, {"segments": torch.tensor([[0, 2]])}, r"segments must hold values in \[-1, 2\)"),
        (TWO, {"cu_seqlens": [0, 3]}, r"cu_seqlens=\[0, 3\] must rise from 0 to the row's length, in 3 numbers"),
        (TWO, {"cu_seqlens": [0, 3, 3]}, "must rise from 0"),
        (TWO, {"cu_seqlens": [0, 1, 2], "segments": SHARED}, "pass one of them"),
        (([1.0, 2.0], *TWO[1:]), {}, "group_ids must be whole numbers"),
        ((["a", "b"], *TWO[1:]), {}, "group_ids must be whole numbers: too many dimensions 'str'"),
        ((None, *TWO[1:]), {}, "group_ids must be whole numbers"),
        (TWO, {"cu_seqlens": [0.0, 1.5, 3.0]}, "must rise from 0"),
        (TWO, {"cu_seqlens": "ab"}, "cu_seqlens must be whole numbers"),
        (TWO, {"group_size": 2.7}, "group_size must be a whole number above 0"),
        (TWO, {"group_size": 0}, "group_size must be a whole number above 0"),
        ((TWO[0], [0.0], TWO[2]), {}, r"rewards has shape \(1,\): expected \(2,\)"),
        (TWO, {"coefficients": [1.0]}, r"coefficients has shape \(1,\)"),
        (TWO, {"group_size": [1, 2, 3]}, "group_size must be a whole number above 0, or one for each"),
    ],
)
def test_wrong_rows_are_named_in_the_first_step(rows, given, message):
    model = Regression()
    recorder = GradientRecorder(model, every=2)
    with pytest.raises(ValueError, match=message), recorder.step():
        recorder.rows(*rows, **given)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"dim": -1}, {"layers": ["x"]}, {"skip": ["x"]}])
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GradientRecorder(Regression(), **options)


def test_rows_and_steps_out_of_order_are_named():
    recorder = GradientRecorder(Regression())
    with pytest.raises(ValueError, match="rows needs an open step"):
        recorder.rows(*TWO)
    with recorder.step(), pytest.raises(ValueError, match="can't be nested"), recorder.step():
        pass


def test_a_wrong_gradient_is_named_and_left_out(caplog):
    """A weight that is used without its layer's forward. The step that finds it isn't logged; the next one is."""

    class Around(Regression):
        def forward(self, x):
            hidden = super().forward(x)
            return hidden + nn.functional.linear(x, self.first.weight)[..., :2]

    model = Around()
    recorder = GradientRecorder(model, every=1, dim=0)
    assert train_step(recorder, model) == {}
    assert "excludes 1 parameters whose sum over sequences isn't their gradient" in caplog.text
    assert "first.weight" in caplog.text and "optimizer step 1 isn't logged" in caplog.text
    metrics = train_step(recorder, model)
    assert metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-5)
    assert 0 < metrics["interference/coverage"] < 1


def test_a_skipped_parameter_is_named_and_not_recorded(caplog):
    model = Regression()
    recorder = GradientRecorder(model, every=1, dim=0, skip=["first.weight"])
    metrics = train_step(recorder, model)
    assert "doesn't record 1 of 4 trainable tensors: first.weight" in caplog.text
    squares = {name: float(parameter.grad.square().sum()) for name, parameter in model.named_parameters()}
    assert metrics["interference/coverage"] == pytest.approx(1 - squares["first.weight"] / sum(squares.values()))


@pytest.mark.parametrize("change", [{"number": None}, {"statistics": {}}, {"statistics": None}, {"number": "x"}])
def test_a_state_of_another_kind_is_refused(change):
    recorder = GradientRecorder(Regression())
    with pytest.raises(ValueError, match="isn't a state of GradientRecorder"):
        recorder.load_state_dict({**recorder.state_dict(), **change})


def test_a_step_that_was_not_begun_is_not_counted():
    recorder = GradientRecorder(Regression(), every=2)
    recorder.end()
    recorder.abandon()
    assert recorder.number == 0
    assert train_step(recorder, recorder.model)


def test_forgotten_rows_are_named(caplog):
    """The second micro-batch has as many sequences as the first: nothing else tells them apart."""
    model = Regression()
    recorder = GradientRecorder(model, every=1)
    with recorder.step():
        recorder.rows(GROUP_B[:3], REWARD_B[:3], ADVANTAGE_B[:3])
        loss_of(model, slice(0, 3)).backward()
        loss_of(model, slice(3, 6)).backward()
    assert recorder.metrics() == {} and "call rows() before each forward pass" in caplog.text


def test_two_forward_passes_before_a_backward_belong_to_the_same_rows():
    model = Regression()
    recorder = GradientRecorder(model, every=1, dim=0)
    with recorder.step():
        recorder.rows(GROUP_B, REWARD_B, ADVANTAGE_B)
        (loss_of(model, slice(0, 6)) / 4 + loss_of(model, slice(0, 6)) * 3 / 4).backward()
    gradient_BN = separate(model)
    prompt_PB = (recorder.inner_products()[0][:, None] == GROUP_B).double()
    expected_PP = prompt_PB @ gradient_BN @ gradient_BN.T @ prompt_PB.T
    torch.testing.assert_close(recorder.inner_products()[1], expected_PP, rtol=1e-5, atol=1e-6)


def test_a_step_with_a_gradient_from_before_is_not_logged(caplog):
    model = Regression()
    loss_of(model, slice(0, 2)).backward()
    recorder = GradientRecorder(model, every=1)
    with recorder.step():
        recorder.rows(GROUP_B, REWARD_B, ADVANTAGE_B)
        loss_of(model, slice(0, 6)).backward()
    assert recorder.metrics() == {} and "Call optimizer.zero_grad() first" in caplog.text
    assert train_step(recorder, model)["interference/sketch_check"] == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(
    "place",
    [
        "grpo_kernels.interference.gradient_sketch.GradientSketch.open",
        "grpo_kernels.interference.gradient_sketch.GradientSketch.set_rows",
        "grpo_kernels.interference.gradient_sketch.GradientSketch.take",
        "grpo_kernels.interference.gradient_sketch.tap",
        "grpo_kernels.interference.layer_sums.LayerSums._linears",
        "grpo_kernels.recorder.gradient_recorder.check_layers",
        "grpo_kernels.recorder.open_step.number_groups",
        "grpo_kernels.recorder.gradient_recorder.measure",
        "grpo_kernels.recorder.open_step.write_step",
        "grpo_kernels.recorder.what_if_log.gradient_noise",
    ],
)
def test_a_failure_never_stops_training(place, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.WARNING)

    def broken(*args, **kwargs):
        raise MemoryError("the recorder is broken")

    def trained():
        model = Regression()
        recorder = GradientRecorder(model, every=1, dim=8)
        for _ in range(3):
            train_step(recorder, model, coefficients=ADVANTAGE_B)
            recorder.save(tmp_path)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
        return model.state_dict()

    expected = trained()
    monkeypatch.setattr(place, broken)
    found = trained()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert caplog.text.count("the recorder is broken") >= 1
    assert caplog.text.count("isn't logged from here on") <= 1


def test_an_error_of_the_loop_passes_through_and_leaves_no_hook():
    model = Regression()
    recorder = GradientRecorder(model, every=1)
    with pytest.raises(ZeroDivisionError), recorder.step():
        recorder.rows(GROUP_B, REWARD_B, ADVANTAGE_B)
        _ = 1 / 0
    assert not any(module._forward_hooks for module in model.modules())
    assert train_step(recorder, model)


def test_rewards_that_are_no_numbers_are_named():
    recorder = GradientRecorder(torch.nn.Linear(3, 1), every=1)
    with recorder.step(), pytest.raises(ValueError, match="rewards must be numbers, one per group id"):
        recorder.rows([0], ["x"], [1.0])


def test_a_step_that_overflows_is_left_out_and_the_next_one_is_logged(caplog):
    """As a GradScaler's first steps do."""
    model = Regression()
    recorder = GradientRecorder(model, every=1, dim=0)
    model.zero_grad()
    with recorder.step():
        recorder.rows(GROUP_B, REWARD_B, ADVANTAGE_B)
        (loss_of(model, slice(0, 6)) * math.inf).backward()
    assert recorder.metrics() == {} and "whose gradient isn't finite" in caplog.text
    assert train_step(recorder, model)["interference/sketch_check"] == pytest.approx(1, abs=1e-5)


def test_gradients_that_are_gone_when_the_step_closes_are_named(caplog):
    model = Regression()
    recorder = GradientRecorder(model, every=1, dim=0)
    with recorder.step():
        recorder.rows(GROUP_B, REWARD_B, ADVANTAGE_B)
        loss_of(model, slice(0, 6)).backward()
        model.zero_grad()
    assert "isn't checked against .grad" in caplog.text and "close it before optimizer.zero_grad()" in caplog.text
    assert "interference/coverage" not in recorder.metrics()


def test_clipped_gradients_are_named(caplog):
    model = Regression()
    recorder = GradientRecorder(model, every=1, dim=0)
    with recorder.step():
        recorder.rows(GROUP_B, REWARD_B, ADVANTAGE_B)
        loss_of(model, slice(0, 6)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert recorder.metrics() == {} and "one that was clipped, unscaled or cleared within the step" in caplog.text


def test_a_group_with_more_answers_than_its_size_is_partial():
    """Two groups of one id, or the same answers twice in a step."""
    model = Regression()
    metrics = train_step(GradientRecorder(model, every=1, dim=0), model, group_size=1)
    assert metrics["interference/partial_groups"] == 3


def test_a_copy_of_the_model_within_a_logged_step_is_not_recorded():
    model = Regression()
    recorder = GradientRecorder(model, every=1, dim=0)
    with recorder.step():
        recorder.rows(GROUP_B, REWARD_B, ADVANTAGE_B)
        loss = loss_of(model, slice(0, 6))
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for one in copies:
            loss_of(one, slice(0, 6)).backward()
        loss.backward()
    gram_PP = recorder.inner_products()[1]
    assert recorder.metrics()["interference/coverage"] == 1
    own = separate(model)
    of_prompt = torch.stack([own[GROUP_B == group].sum(0) for group in (-8, 5, 30)])
    torch.testing.assert_close(gram_PP, of_prompt @ of_prompt.T, rtol=1e-5, atol=1e-6)


def test_segments_that_end_before_the_row_are_not_stretched(caplog):
    """Half of a row is padding: two of its positions must not count as one."""
    model = Regression()
    recorder = GradientRecorder(model, every=1, dim=0)
    with recorder.step():
        recorder.rows([1, 2], [0.0, 1.0], [1.0, 1.0], cu_seqlens=[0, 1, 2])
        model(X[:1]).sin().sum().backward()
    assert recorder.metrics() == {} and "saw 4 positions of a row whose segments hold 2" in caplog.text


def test_files_of_an_earlier_run_in_the_folder_are_skipped(tmp_path):
    for steps, every in ((9, 4), (6, 3)):
        model = Regression()
        recorder = GradientRecorder(model, every=every, dim=8)
        for _ in range(steps):
            train_step(recorder, model)
            recorder.save(tmp_path)
    with pytest.warns(UserWarning, match="2 files of an earlier run are skipped"):
        assert [record.step for record in read_interference(tmp_path)] == [1, 4]
    resumed = GradientRecorder(model, every=3, dim=8)
    resumed.load_state_dict(json.loads(json.dumps(recorder.state_dict())))
    train_step(resumed, model)
    resumed.save(tmp_path)
    with pytest.warns(UserWarning, match="2 files of an earlier run are skipped"):
        assert [record.step for record in read_interference(tmp_path)] == [1, 4, 7]


def test_wrong_rows_of_a_later_call_end_the_logging_alone(caplog):
    """An answer without a reward in the middle of a run."""
    model = Regression()
    recorder = GradientRecorder(model, every=1, dim=0)
    assert train_step(recorder, model)
    model.zero_grad()
    with recorder.step():
        recorder.rows([1, 1], [0.0, None], [0.0, 1.0])
        loss_of(model, slice(0, 2)).backward()
    assert recorder.metrics() == {} and "isn't logged from here on: ValueError: rewards must be numbers" in caplog.text
    assert train_step(recorder, model) == {}


@pytest.mark.parametrize(("advantages", "named"), [(ADVANTAGE_B, True), (torch.zeros(6), False)])
def test_rows_without_a_pass_are_named_unless_they_are_dead(advantages, named, caplog):
    model = Regression()
    recorder = GradientRecorder(model, every=1, dim=0)
    with recorder.step():
        recorder.rows(GROUP_B, REWARD_B, advantages)
        recorder.rows(GROUP_B, REWARD_B, ADVANTAGE_B)
        loss_of(model, slice(0, 6)).backward()
    assert ("rows() was called without a forward pass after it" in caplog.text) is named
    assert recorder.metrics()["interference/coverage"] == 1
