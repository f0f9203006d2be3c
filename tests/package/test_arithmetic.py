"""The built-in problems: right answers, seeded, levels, nothing shared between training and held-out."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext.tasks.arithmetic import LARGEST, LEVELS, generate_problems, problem_split


def operands(problem):
    return tuple(int(number) for number in re.findall(r"\d+", problem.question))


@settings(max_examples=40, deadline=None)
@given(level=st.sampled_from(list(LEVELS)), seed=st.integers(0, 1000), split=st.sampled_from(["train", "held_out"]))
def test_answers_follow_from_the_question(level, seed, split):
    for problem in generate_problems(20, split=split, levels=(level,), seed=seed):
        numbers = operands(problem)
        assert all(0 <= n <= (LARGEST[level] if i < 2 else 2 * LARGEST[level]) for i, n in enumerate(numbers))
        if level == 5:
            assert problem.answer == numbers[0] + numbers[1] - numbers[2]
        elif "+" in problem.question or "gets" in problem.question or "in all" in problem.question:
            assert problem.answer == numbers[0] + numbers[1]
        else:
            assert "loses" in problem.question or "gives" in problem.question
            assert problem.answer == numbers[0] - numbers[1]
        assert problem.answer >= 0 and problem.level == level


def test_seeded_and_different():
    first = generate_problems(100, levels=(1, 4), seed=1)
    assert first == generate_problems(100, levels=(1, 4), seed=1)
    assert first != generate_problems(100, levels=(1, 4), seed=2)
    assert len({problem.question for problem in first}) == 100
    assert [problem.level for problem in first[:4]] == [1, 4, 1, 4]


def test_held_out_operands_are_never_trained_on():
    """In whatever wording and order: 12 + 7, 7 + 12 and a story that adds them are one calculation."""

    def calculations(split):
        found = set()
        for seed in range(3):
            for problem in generate_problems(150, split=split, levels=(1, 2, 3, 4), seed=seed):
                numbers = operands(problem)
                found.add(("+", *sorted(numbers)) if problem.answer == sum(numbers) else ("-", *numbers))
        return found

    train, held_out = calculations("train"), calculations("held_out")
    assert len(held_out) > 50
    # x + 0 and x - 0 read the same from the outside
    assert not {item for item in train & held_out if 0 not in item}
    assert problem_split((12, 7), "+") == problem_split((7, 12), "+")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 5, "levels": (1, 9)}, r"levels=\(1, 9\): choose from \(1, 2, 3, 4, 5\)"),
        ({"count": 5, "levels": ()}, "levels="),
        ({"count": 5, "split": "test"}, "split='test' is not one of"),
        ({"count": 0}, "count=0 must be at least 1"),
        ({"count": 5000, "levels": (1,)}, r"count=5000 is more than the train problems that levels \(1,\) have"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_problems(**arguments)
