"""The built-in mixture: what is asked, who is right, which side of the split; and the policy warmed up for it."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.tasks import mixed_policy as mixed
from examples.tasks.correctness import SameText
from examples.tasks.mixture import SPLITS, TASKS, content_split, generate_exercises


def solve(question):
    """The answer, by another way than the generator's: from the question's text alone."""
    if numbers := re.fullmatch(r"What is (\d+) \+ (\d+)\?", question):
        return str(int(numbers[1]) + int(numbers[2]))
    if letters := re.fullmatch(r"Reverse ([a-z ]+)\.", question):
        return letters[1][::-1]
    if letters := re.fullmatch(r"Sort ([a-z ]+)\.", question):
        return " ".join(sorted(letters[1].split()))
    facts = re.findall(r"([a-z]) beats ([a-z])", question)
    winners, losers = ({fact[side] for fact in facts} for side in (0, 1))
    (answer,) = winners - losers if question.endswith("Who is best?") else losers - winners
    return answer


@settings(max_examples=40, deadline=None)
@given(task=st.sampled_from(list(TASKS)), split=st.sampled_from(SPLITS), seed=st.integers(0, 10**6))
def test_answers_are_right_and_slips_wrong(task, split, seed):
    for exercise in generate_exercises(20, split=split, tasks=(task,), seed=seed):
        assert exercise.answer == solve(exercise.question) != exercise.slip
        assert exercise.task == task


def test_the_same_arguments_give_the_same_list_tasks_taking_turns():
    first = generate_exercises(40, seed=1)
    assert first == generate_exercises(40, seed=1) != generate_exercises(40, seed=2)
    assert [exercise.task for exercise in first] == list(TASKS) * 10
    assert len({exercise.question for exercise in first}) == 40


def content(exercise):
    """What must not be on both sides, whatever is asked of it and in whatever order: numbers, letters, players."""
    return tuple(sorted(set(re.findall(r"\b\d+\b|\b[a-z]\b", exercise.question))))


def test_no_content_is_on_both_sides():
    train = generate_exercises(2000, split="train", seed=0)
    held_out = [e for seed in (0, 1) for e in generate_exercises(400, split="held_out", seed=seed)]
    assert not {content(e) for e in train} & {content(e) for e in held_out}
    asked = generate_exercises(1000, tasks=("puzzles",), seed=0)
    assert {e.question.rsplit(" ", 1)[1] for e in asked} == {"best?", "worst?"}
    assert content_split((12, 7)) == content_split([7, 12])
    share = sum(content_split((a, b)) == "held_out" for a in range(1, 100) for b in range(1, 10)) / 891
    assert 0.15 < share < 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 5, "tasks": ("sums", "chess")}, r"tasks=\('sums', 'chess'\): choose from \('sums', 'reversals'"),
        ({"count": 5, "tasks": ()}, "tasks="),
        ({"count": 5, "split": "test"}, "split='test' is not one of"),
        ({"count": 0}, "count=0 must be at least 1"),
        ({"count": 800, "tasks": ("sums",)}, "count=800 is more than the train exercises that sums have"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_exercises(**arguments)


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        (" a b c d", "a b c d", 1.0),
        ("A  B\nC d ", "a b c d", 1.0),
        ("a b d c", "a b c d", 0.0),  # as mathematics they would be equal
        ("so it is <answer> 108 </answer>", "108", 1.0),
        ("so <answer>4</answer> or <answer>a\nb</answer>", "a b", 1.0),
        ("so \\boxed{q}", "q", 1.0),
        ("it is\n#### 108", "108", 1.0),
        ("108.", "108", 1.0),
        ("\\boxed{\\text{a b c d}}", "a b c d", 1.0),
        ("108 or so", "108", 0.0),
        ("amdk", "a m d k", 0.0),
        ("", "108", 0.0),
        ([{"role": "assistant", "content": " 108"}], "108", 1.0),
    ],
)
def test_the_same_text(completion, gold, reward):
    logged = {}
    assert SameText()([completion], [gold], log_metric=logged.__setitem__) == [reward]
    assert logged == {"accuracy": reward}


def test_digits_and_letters_are_tokens():
    tokenizer = mixed.build_tokenizer()
    assert tokenizer.tokenize(" 108") == ["Ġ", "1", "0", "8"]
    assert tokenizer.tokenize(" m a k b") == ["Ġm", "Ġa", "Ġk", "Ġb"]
    longest = max(len(tokenizer.encode(f" {e.answer}<eos>")) for e in generate_exercises(1000, seed=0))
    assert longest == 5  # max_completion_length of recipes/demo.yaml


def test_the_warm_up_in_short(monkeypatch):
    """It reports, is repeatable, leaves the global random state alone; the whole one is nightly's."""
    monkeypatch.setattr(mixed, "LEARNING_STEPS", 25)
    monkeypatch.setattr(mixed, "CARELESS_STEPS", 1)
    monkeypatch.setattr(mixed, "EXERCISES", dict.fromkeys(TASKS, 100))
    state = torch.random.get_rng_state()
    reports = []
    first = mixed.warm_up(3, lambda step, reached: reports.append((step, reached)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [step for step, _ in reports] == [25, 26] and set(reports[0][1]) == set(TASKS)
    again = mixed.warm_up(3)
    assert first[2] == again[2]
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), again[0].parameters(), strict=True))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 42])
def test_the_warm_up_reaches_its_targets(seed):
    _, _, reached = mixed.warm_up(seed)
    assert all(0.03 < accuracy < 0.75 for accuracy in reached.values()), reached
    assert max(reached.values()) > 3 * min(reached.values())
