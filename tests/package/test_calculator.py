"""The calculator example: its tool, its templates as TRL and transformers read them, and the run itself."""

import json

import pytest
from processes import ROOT, run_script, start
from trl.chat_template_utils import supports_tool_calling

from examples.tasks.calculator import SameNumber, build_tokenizer, calculate, calculator_policy, questions


@pytest.fixture(scope="module")
def calling_policy():
    """The example's policy, where it finds it, cached between sessions."""
    return calculator_policy(42)


@pytest.mark.parametrize(("expression", "result"), [("12 + 34", "46"), (" 7+5 ", "12"), ("999 + 1", "1000")])
def test_the_tool(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize("expression", ["12", "12 + 34 + 5", "12 - 3", "__import__('os')", "-1 + 2", ""])
def test_what_isn_t_a_sum_is_refused(expression):
    with pytest.raises(ValueError, match="isn't a sum of two whole numbers"):
        calculate(expression)


def test_a_call_is_written_and_read_back():
    tokenizer = build_tokenizer()
    assert supports_tool_calling(tokenizer)
    user = [{"role": "user", "content": "What is 12 + 34 + 56?"}]
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": "12 + 34"}}}
    asked = [*user, {"role": "assistant", "content": "", "tool_calls": [call]}]
    told = [*asked, {"role": "tool", "name": "calculate", "content": "46"}]
    prompt, whole, after = (tokenizer.apply_chat_template(one, tokenize=False) for one in (user, asked, told))
    assert whole == prompt + "<call>calculate expression 12 + 34<eos>" and after == whole + "<result>46<assistant>"
    ids = tokenizer(whole.removeprefix(prompt)).input_ids
    message = tokenizer.parse_response(ids, prefix=tokenizer(prompt).input_ids)
    (read,) = message["tool_calls"]
    assert read["function"]["name"] == "calculate"
    assert calculate(**read["function"]["arguments"]) == "46"
    answer = tokenizer.parse_response(tokenizer(" 102<eos>").input_ids, prefix=tokenizer(prompt).input_ids)
    assert answer["content"].strip() == "102" and not answer.get("tool_calls")


def test_questions_are_sums_of_three_held_apart():
    train, held_out = (questions(200, held_out=held, seed=3) for held in (False, True))
    asked = [{row["prompt"][0]["content"] for row in data} for data in (train, held_out)]
    assert not asked[0] & asked[1] and len(asked[0]) == len(asked[1]) == 200
    for row in held_out:
        numbers = row["prompt"][0]["content"].removeprefix("What is ").rstrip("?").split(" + ")
        assert row["gold"] == str(sum(map(int, numbers)))
    assert questions(20, held_out=True, seed=3)[:] == held_out[:20]


@pytest.mark.parametrize("count", [0, -1, 100_001])
def test_a_wrong_number_of_questions_is_named(count):
    with pytest.raises(ValueError, match=f"count={count} must be from 1 to 100000"):
        questions(count, held_out=True, seed=0)


def test_the_last_message_is_what_counts():
    call = {"role": "assistant", "content": "", "tool_calls": [{}]}
    conversations = [
        [call, {"role": "tool", "content": "46"}, {"role": "assistant", "content": " 46 "}],
        [call, {"role": "tool", "content": "46"}],  # cut off before it could answer
        [{"role": "assistant", "content": "45"}],
        [{"role": "assistant", "content": "46", "tool_calls": [{}]}],
    ]
    logged = {}
    assert SameNumber()(conversations, ["46"] * 4, log_metric=logged.__setitem__) == [1.0, 0.0, 0.0, 0.0]
    assert logged == {"accuracy": 0.25}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_example(processes, calling_policy, tmp_path):
    """Over several turns, on one and two processes: tools are called, dead groups skipped, prompts run once, and
    interference logged."""
    folder = tmp_path / "run"
    options = (
        f"--output_dir {folder} --use_cpu true --max_steps 6 --logging_steps 1 --interference_every 2 --eval_steps 6 "
        f"--per_device_train_batch_size {64 // processes} --per_device_eval_batch_size 64"
    ).split()
    script = ROOT / "examples" / "calculator.py"
    started = start(processes, run_script, script, options, folder=tmp_path / "out", cwd=ROOT)
    assert started.finish() == [0] * processes, started.text()[-4000:]
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    steps = [log for log in logs if "grad_norm" in log]
    assert len(steps) == 6 and any(log["grad_norm"] > 0 for log in steps)
    assert all(log["tools/call_frequency"] > 0.2 for log in steps)
    assert any(log["tools/failure_frequency"] < 0.5 for log in steps)
    assert any(log["compute/sequences_skipped_frac"] > 0 for log in steps)
    assert any(log["compute/flops_saved_frac"] > log["compute/sequences_skipped_frac"] for log in steps)
    assert any("interference/cos_mean" in log for log in steps)
    assert all("eval_accuracy" in log for log in logs if "eval_runtime" in log)
    assert started.text().count("python -m trl_ext report") == 1  # one process speaks
