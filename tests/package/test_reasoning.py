"""Tasks of reasoning-gym: names, options, weights, questions that differ, scores; and a reward of one's own."""

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("reasoning_gym", reason="the extra 'reasoning' isn't installed")

from hypothesis import given
from hypothesis import strategies as st
from processes import ROOT, environment

from examples.tasks import reasoning
from examples.tasks.questions import build_dataset, read_questions
from examples.tasks.reasoning import GymScore, Tasks, counts, task_names, task_options, task_weights
from trl_ext.load_function import load_function

SCRIPT = ROOT / "examples" / "math.py"
TWO = ["chain_sum", "gcd"]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (task_names, ("reasoning_gym:chain_sun",), "no task 'chain_sun', did you mean chain_sum"),
        (task_names, ("reasoning_gym:xyzzy",), "no task 'xyzzy'; it has"),
        (task_names, ("reasoning_gym:",), "which tasks"),
        (task_names, ("reasoning_gym:gcd,gcd",), "gcd is given twice"),
        (task_options, (TWO, ["chain_sum.max_term=3"]), "no option 'max_term', did you mean max_terms"),
        (task_options, (TWO, ["gdc.max_value=3"]), "'gdc' isn't a task of this run, did you mean gcd"),
        (task_options, (TWO, ["max_terms=3"]), "must be TASK.OPTION=VALUE"),
        (task_options, (TWO, ["chain_sum.seed=3"]), "no option 'seed'"),
        (task_weights, (TWO, [0, 0]), "sum to 0"),
        (task_weights, (TWO, [1]), "1 for 2 tasks"),
        (task_weights, (TWO, [2, -1]), "-1 is negative"),
        (task_weights, (TWO, [float("nan"), 1]), "finite"),
        (task_weights, (TWO, [float("inf"), 1]), "finite"),
        (Tasks, (TWO[:1], [1.0], {"chain_sum": {"max_terms": 0}}, 0), "chain_sum refuses {'max_terms': 0}: max_terms"),
    ],
)
def test_bad_tasks_options_and_weights_are_named(function, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(*arguments)


def test_options_reach_the_configuration():
    options = task_options(TWO, ["chain_sum.min_terms=2", "chain_sum.max_terms=2", "gcd.max_value=20"])
    assert options == {"chain_sum": {"min_terms": 2, "max_terms": 2}, "gcd": {"max_value": 20}}
    tasks = Tasks(TWO, [1.0, 1.0], options, seed=3)
    for question in tasks.questions(40, held_out=False):
        metadata = tasks.entries[question.task, question.question]["metadata"]
        if question.task == "chain_sum":
            assert question.question.count(" + ") + question.question.count(" - ") == 1
        else:
            assert max(metadata["numbers"]) <= 20


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(lambda w: sum(w) > 0.1), st.integers(6, 500))
def test_counts_follow_the_weights(weights, total):
    found = counts(weights, total)
    assert sum(found) == total
    for weight, count in zip(weights, found, strict=True):
        assert (count > 0) is (weight > 0)
        assert abs(count - total * weight / sum(weights)) < 1 + len(weights)


def test_held_out_questions_are_others_and_seeds_repeat():
    def made(seed):
        tasks = Tasks(["chain_sum", "spell_backward"], [3.0, 1.0], {"chain_sum": {}, "spell_backward": {}}, seed)
        return tasks.questions(80, held_out=False), tasks.questions(40, held_out=True)

    train, held_out = made(0)
    assert not {one.question for one in train} & {one.question for one in held_out}
    assert len({one.question for one in train}) == 80 and sum(one.task == "chain_sum" for one in train) == 60
    assert made(0) == (train, held_out) and made(1)[0] != train
    assert len({one.task for one in train[:12]}) == 2  # mixed


def test_a_small_task_says_how_much_there_is():
    options = {"coin_flip": {"min_trials": 1, "max_trials": 1}}
    with pytest.raises(ValueError, match=r"coin_flip has only \d+ different training questions, not 90"):
        Tasks(["coin_flip"], [1.0], options, 0).questions(90, held_out=False)


def test_scores_are_the_tasks_own():
    names = ["chain_sum", "spell_backward", "sudoku"]
    tasks = Tasks(names, [1.0] * 3, {name: {} for name in names}, seed=0)
    questions = tasks.questions(12, held_out=False)
    said, logged = [], {}
    score = GymScore(tasks, said.append)
    asked = {"question": [one.question for one in questions], "task": [one.task for one in questions]}
    right = [f"First I think. <answer>{one.answer}</answer>" for one in questions]
    assert score(right, **asked, log_metric=logged.__setitem__) == [1.0] * 12 and logged == {"accuracy": 1.0}
    as_chat = [[{"role": "assistant", "content": one.answer}] for one in questions]
    assert score(as_chat, **asked) == [1.0] * 12
    wrong = score(["<answer>nothing of it</answer>"] * 12, **asked, log_metric=logged.__setitem__)
    assert max(wrong) < 0.5 and logged == {"accuracy": 0.0}
    with pytest.raises(ValueError, match="sudoku has made no question 'another'"):
        score(["1"], question=["another"], task=["sudoku"])


def test_a_scorer_that_fails_counts_as_wrong_and_is_said_once():
    tasks = Tasks(["gcd"], [1.0], {"gcd": {}}, 0)
    question = tasks.questions(1, held_out=False)[0]
    tasks.scorers["gcd"].score_answer = lambda answer, entry: 1 / 0
    said = []
    score = GymScore(tasks, said.append)
    assert score(["1", "2"], question=[question.question] * 2, task=["gcd"] * 2) == [0.0, 0.0]
    assert len(said) == 1 and "gcd: its scorer fails" in said[0] and "ZeroDivisionError" in said[0]


def test_every_task_can_be_asked():
    """One question of each of the hundred; its answer, where it has one, is scored right."""
    from reasoning_gym.factory import DATASETS

    without = []
    for name in sorted(set(DATASETS) - {"composite"}):  # which is made of others
        tasks = Tasks([name], [1.0], {name: {}}, 0)
        question = tasks.questions(1, held_out=False)[0]
        score = GymScore(tasks, pytest.fail)([question.answer], [question.question], [name])[0]
        if question.answer:
            assert score >= reasoning.RIGHT, name
        else:
            without.append(name)
    # of these any right answer will do
    assert without == ["boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"]


# ---- the script


def run(folder, *arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder, timeout=600)
    return done.returncode, done.stdout + done.stderr


def trained(policy, folder, *arguments):
    """What a short run in this folder prints, and its log."""
    code, printed = run(folder, "--model_name_or_path", policy, "--output_dir", "run", *arguments, *SHORT)
    assert code == 0, printed
    lines = (folder / "run" / "log_history.jsonl").read_text().splitlines()
    return printed, [json.loads(line) for line in lines]


SHORT = (
    "--max_steps 2 --num_generations 4 --per_device_train_batch_size 16 --max_completion_length 4 --logging_steps 1 "
    "--interference_every 1 --num_generations_eval 1 --eval_strategy steps --eval_steps 2 --eval_size 8 --bf16 false"
).split()


@pytest.mark.nightly
def test_a_mixture_by_the_script(tiny_policy, tmp_path):
    mixture = ["--dataset", "reasoning_gym:chain_sum,gcd", "--task_weights", "2", "1"]
    options = ["--task_options", "chain_sum.max_terms=2", "--train_size", "60"]
    printed, logs = trained(tiny_policy, tmp_path, *mixture, *options)
    assert "60 training and 8 held-out questions" in printed and "By task (mean reward):" in printed
    assert any("tasks/chain_sum/reward" in log for log in logs) and any("eval_tasks/gcd/reward" in log for log in logs)


def test_a_reward_of_ones_own_by_the_script(tiny_policy, tmp_path):
    """It gets the file's other columns; the answers needn't be mathematics, nor be there."""
    (tmp_path / "mine.py").write_text(
        "def short(completions, wanted, task, **columns):\n"
        "    assert set(task) <= {'a', 'b'}\n"
        "    return [float(len(c[0]['content']) % 2 == w % 2) for c, w in zip(completions, wanted)]\n"
    )
    rows = [{"question": f"Say {i}", "wanted": i, "task": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    printed, logs = trained(tiny_policy, tmp_path, "--dataset_path", "mine.jsonl", "--reward", "mine:short")
    assert any("tasks/b/reward" in log and "rewards/short/mean" in log for log in logs)
    assert "Held-out reward: " in printed and "By task (mean reward):" in printed


def test_columns_travel_with_questions(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"question": "a", "answer": "1", "task": "t", "unit": "m", "prompt": "x"}\n')
    plain = read_questions(tmp_path / "mine.jsonl")
    assert plain[0].task == "t" and plain[0].more == {}
    dataset = build_dataset(read_questions(tmp_path / "mine.jsonl", own_reward=True), "chat")
    assert dataset[0]["unit"] == "m" and dataset[0]["task"] == "t" and dataset[0]["prompt"][0]["content"] == "a"


def test_wrong_rewards_are_named_before_anything_is_loaded(tmp_path):
    (tmp_path / "broken.py").write_text("raise RuntimeError('no luck')")
    code, printed = run(tmp_path, "--reward", "broken:f")
    assert code == 1 and "error: --reward broken:f: RuntimeError: no luck" in printed and "Traceback" not in printed
    for place, message in (
        ("nowhere:f", "No module named 'nowhere'"),
        ("json:loadz", "no attribute 'loadz'"),
        ("json", "must be module:name"),
        ("json:decoder", "is not a function"),
    ):
        with pytest.raises(ValueError, match=f"--reward .*{message}"):
            load_function(place, "--reward")
