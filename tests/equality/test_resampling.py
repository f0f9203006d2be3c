"""``resample_zero_variance``: other prompts in place of those whose answers all got the same reward."""

import pytest
import torch
from datasets import Dataset
from harness import (
    FOUR,
    build,
    dead_share,
    live_or_not,
    logged,
    logged_texts,
    parameters,
    prompts,
    question,
    reward_with_dead,
    table,
    train,
)
from hypothesis import given
from hypothesis import strategies as st
from two_process_worker import assert_same_run, run_processes

from trl_ext import read_interference
from trl_ext.advantages import resampling
from trl_ext.advantages.resampling import Resampling
from trl_ext.schema import Sequences, join, pad_rows, split_rows

ON = {**FOUR, "resample_zero_variance": True}


@pytest.fixture(scope="module")
def trainer(tiny_policy, tmp_path_factory):
    """Trained for one step, six in ten prompts dead."""
    return train(tiny_policy, tmp_path_factory.mktemp("run"), live_or_not(0.6), max_steps=1, **ON)


def test_dead_prompts_make_room(trainer):
    log = trainer.recorder.logs[0]
    assert log["resampling/rounds"] > 1 and log["resampling/prompts_drawn"] == 4 * log["resampling/rounds"]
    assert log["resampling/live_prompts"] == 4 and log["normalization/zero_variance_frac"] == 0
    # what is trained on, and what is logged of it
    batch = join([Sequences(part) for part in trainer._buffered_inputs]).columns
    assert sorted(batch["prompt_id"].tolist()) == sorted([p for p in range(4) for _ in range(4)])
    groups = [set(batch["prompt_key"][batch["prompt_id"] == p].tolist()) for p in range(4)]
    assert all(len(keys) == 1 for keys in groups) and len(set.union(*groups)) == 4
    texts = logged_texts(trainer, "prompt")
    assert len(texts) == 16 and not any(dead_share(question(text), 0.6) for text in texts)
    tokenizer = trainer.processing_class
    said = set(logged_texts(trainer, "completion"))
    for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
        assert tokenizer.decode(ids[mask.bool()], skip_special_tokens=True).strip() in {text.strip() for text in said}
    asked = " ".join(texts)
    for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True):
        assert tokenizer.decode(ids[mask.bool()]).split("<user>")[1].split("<assistant>")[0].strip() in asked
    assert list(trainer._logs["rewards"]["reward"]) == [0.0, 0.25, 0.5, 0.75] * 4
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert log["compute/sequences_skipped_frac"] == 0
    assert log["compute/answers_per_live_group"] == 16 * log["resampling/rounds"] / 4


def test_the_first_live_ones_are_kept_in_order(trainer, tiny_policy, tmp_path):
    """The live prompts of the first generation stay; the numbers of tokens are those of all that was drawn."""
    plain = train(tiny_policy, tmp_path, live_or_not(0.6), max_steps=1, **FOUR)
    drawn, kept = logged_texts(plain, "prompt"), logged_texts(trainer, "prompt")
    live = [text for text in drawn if not dead_share(question(text), 0.6)]
    assert 0 < len(live) < 16 and kept[: len(live)] == live
    assert plain.recorder.logs[0]["compute/answers_per_live_group"] == 16 / (len(live) / 4)
    assert trainer.recorder.logs[0]["num_tokens"] > plain.recorder.logs[0]["num_tokens"]
    assert not any("resampling" in key for key in plain.recorder.logs[0])


def test_wanted_and_cap(tiny_policy, tmp_path):
    everything_dead = train(tiny_policy, tmp_path, live_or_not(1.0), resample_max_rounds=2, **ON)
    for log in everything_dead.recorder.logs[:2]:
        assert log["resampling/rounds"] == 3 and log["resampling/live_prompts"] == 0 and log["grad_norm"] == 0
        assert log["compute/answers_per_live_group"] == 3 * 16
    enough = train(tiny_policy, tmp_path, live_or_not(0.6), max_steps=4, resample_live_prompts=1, **ON)
    logs = logged(enough, "resampling/rounds")
    assert all(log["resampling/live_prompts"] >= 1 for log in logs)
    assert sum(log["resampling/rounds"] for log in logs) < 2 * len(logs)


def test_rows_are_gathered_only_where_something_is_resampled(tiny_policy, tmp_path, monkeypatch):
    gathered = []
    monkeypatch.setattr(resampling, "gather_object", lambda parts: gathered.append(len(parts[0])) or parts)
    trainer = train(tiny_policy, tmp_path / "live", live_or_not(0.0), **ON)
    assert gathered == [] and trainer.recorder.logs[0]["resampling/rounds"] == 1
    trainer = train(tiny_policy, tmp_path / "dead", live_or_not(0.6), max_steps=1, **ON)
    assert trainer.recorder.logs[0]["resampling/rounds"] > 1
    assert gathered == [16]  # the batch that is kept, whatever was drawn


def test_a_dataset_without_other_prompts(tiny_policy, tmp_path, caplog):
    trainer = build(tiny_policy, tmp_path, live_or_not(1.0), max_steps=1, **ON)
    trainer.train_dataset = trainer.train_dataset.select(range(6))
    trainer.train()
    assert trainer.recorder.logs[0]["resampling/rounds"] == 1
    assert sum("no other prompts" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}, {"beta": 0.05}], ids=str)
def test_the_gradient_is_that_of_the_batch(options, tiny_policy, tmp_path):
    """Skipping or not, the same parameters: token weights and log-probs are the merged batch's."""
    ends = []
    for skip in (True, False):
        options = {**ON, **options, "max_steps": 4, "learning_rate": 0.1, "skip_zero_advantage": skip}
        trainer = build(tiny_policy, tmp_path, reward_with_dead(0.6), **options)
        before = parameters(trainer.model)
        trainer.train()
        ends.append(parameters(trainer.model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
    assert sum((ends[0][name] - start).abs().max() for name, start in before.items()) > 1e-3
    assert any(log["resampling/rounds"] > 1 for log in logged(trainer, "resampling/rounds"))


SAVED = {"save_strategy": "steps", "save_steps": 2, **ON}


def test_resumed_runs_draw_the_same(tiny_policy, tmp_path):
    options = {**SAVED, "max_steps": 4, "learning_rate": 0.1}
    whole = train(tiny_policy, tmp_path, live_or_not(0.6), **options)
    resumed = train(tiny_policy, tmp_path, live_or_not(0.6), resume=str(tmp_path / "checkpoint-2"), **options)
    torch.testing.assert_close(parameters(whole.model), parameters(resumed.model), rtol=1e-6, atol=1e-7)
    assert table(whole, "prompt") == table(resumed, "prompt")
    assert any(log.get("resampling/rounds", 0) > 1 for log in whole.recorder.logs[2:])


# an epoch of six micro-batches, four an optimizer step: TRL's count of them isn't a step's after it
SHORT_STEP = {**FOUR, "steps_per_generation": 2, "num_train_epochs": 3, "max_steps": -1}


def test_resumed_runs_draw_the_same_after_a_short_step(tiny_policy, tmp_path, monkeypatch):
    orders = []
    order = Resampling._order

    def spy(self, size, step, generation):
        orders.append((step, order(self, size, step, generation)))
        return list(orders[-1][1])

    monkeypatch.setattr(Resampling, "_order", spy)
    arguments = (tiny_policy, tmp_path, live_or_not(0.6), prompts(6))
    train(*arguments, **{**SAVED, **SHORT_STEP})
    whole = [one for one in orders if one[0] >= 2]
    orders.clear()
    train(*arguments, **{**SAVED, **SHORT_STEP}, resume=str(tmp_path / "checkpoint-2"))
    assert orders == whole and len(whole) > 2


def test_prompts_keep_their_texts_after_a_short_step(tiny_policy, tmp_path):
    train(tiny_policy, tmp_path, live_or_not(0.3), prompts(6), **SHORT_STEP, interference_every=1)
    records = read_interference(tmp_path)
    assert len(records) > 3 and all(all(record.prompt_text_P) for record in records)


def test_columns_that_a_round_does_not_log_are_empty(tiny_policy, tmp_path):
    calls = []

    def reward(prompts, log_extra, **kwargs):
        calls.append(1)
        if len(calls) != 2:
            log_extra("about", [prompt[0]["content"] for prompt in prompts])
        return live_or_not(0.6)(prompts)

    trainer = train(tiny_policy, tmp_path, reward, max_steps=1, **ON)
    pairs = list(zip(trainer._logs["extra"]["about"], logged_texts(trainer, "prompt"), strict=True))
    assert all(about in (None, prompt) for about, prompt in pairs)
    assert len(calls) > 2 and {about is None for about, _ in pairs} == {True, False}


def test_two_processes_draw_what_one_does(tiny_policy, tmp_path):
    """Three groups of eight, the second split between the processes."""
    options = {"resample_zero_variance": True, "max_steps": 3}
    one = run_processes(1, tiny_policy, tmp_path / "one", dead=0.6, **options)[0]
    two = run_processes(2, tiny_policy, tmp_path / "two", dead=0.6, **options)
    assert_same_run(two[0], one)
    torch.testing.assert_close(two[0]["parameters"], two[1]["parameters"], rtol=0, atol=0)
    logs = [
        [{name: value for name, value in log.items() if name.startswith("resampling/")} for log in run["logs"]]
        for run in (one, two[0])
    ]
    assert logs[0] == logs[1] and len(logs[0][0]) == 3
    assert any(log.get("resampling/rounds", 0) > 1 for log in logs[0])


def test_datasets_that_cannot_be_drawn_from(tiny_policy, tmp_path):
    with pytest.raises(ValueError, match="IterableDataset, which has no length"):
        build(tiny_policy, tmp_path, train_dataset=prompts(8).to_iterable_dataset(), **ON)
    images = Dataset.from_dict({"prompt": ["a"] * 8, "image": [None] * 8})
    with pytest.raises(ValueError, match="the column 'image' of train_dataset isn't supported"):
        build(tiny_policy, tmp_path, train_dataset=images, **ON)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=6),
    st.sampled_from([None, 4]),
    st.booleans(),
)
def test_rows_there_and_back(lengths, multiple_of, per_token):
    """TRL's dict -> rows -> TRL's dict, whatever the padding was."""
    generator = torch.Generator().manual_seed(0)
    n, width = len(lengths), 9
    prompt_mask = torch.stack([torch.arange(width) >= width - p for p, _ in lengths]).long()
    completion_mask = torch.stack([torch.arange(width) < c for _, c in lengths]).long()
    ids = torch.randint(2, 99, (2, n, width), generator=generator)
    ratio = torch.rand(n, width if per_token else 1, generator=generator)
    output = {
        "prompt_ids": torch.where(prompt_mask.bool(), ids[0], 1),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.where(completion_mask.bool(), ids[1], 1),
        "completion_mask": completion_mask,
        "tool_mask": torch.where(completion_mask.bool(), ids[1] % 2, 1),
        "importance_sampling_ratio": torch.where(completion_mask.bool(), ratio, 1.0) if per_token else ratio,
        "advantages": torch.randn(n, generator=generator),
        "num_items_in_batch": torch.tensor(3),
    }
    back = pad_rows(split_rows(output, [c for _, c in lengths]), 1, multiple_of, "cpu")
    longest_prompt, longest = max(p for p, _ in lengths), max(c for _, c in lengths)
    if multiple_of:
        longest_prompt, longest = (-(-x // multiple_of) * multiple_of for x in (longest_prompt, longest))
    for name, value in back.items():
        expected = output[name]
        if name.startswith("prompt"):
            expected = expected[:, width - longest_prompt :]
        elif expected.ndim == 2 and expected.shape[1] == width:
            expected = expected[:, :longest]
        torch.testing.assert_close(value, expected, msg=name)
    assert set(back) == set(output) - {"num_items_in_batch"}
    with pytest.raises(ValueError, match="doesn't support batches with pixel_values"):
        split_rows({**output, "pixel_values": ids}, [1] * n)
