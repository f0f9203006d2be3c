"""Files of questions, gold answers and the correctness reward, on hand-made and on real data."""

import json
import threading

import pytest
from datasets import Dataset

from examples.tasks.correctness import Correctness, MarkedAnswer, drop_bad_gold, is_correct, parse_gold
from examples.tasks.questions import (
    NEXT_QUESTION,
    Question,
    build_dataset,
    few_shot_prompt,
    hold_out,
    hub_questions,
    read_questions,
)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


ROWS = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 3?", "answer": "so #### 5"}]


def test_the_three_file_types_agree(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    wanted = [Question("1 + 1?", "2", 1), Question("2 + 3?", "so #### 5", 2)]
    for path in (jsonl, tmp_path / "a.json", tmp_path / "a.parquet"):
        assert read_questions(path) == wanted


def test_columns(tmp_path):
    both = write(tmp_path / "m.jsonl", [{"problem": "p", "solution": r"\boxed{3}", "answer": "3"}])
    assert read_questions(both)[0].answer == "3"
    assert read_questions(both, answer_column="solution")[0].answer == r"\boxed{3}"
    mapped = write(tmp_path / "w.jsonl", [{"input": "one apple and one", "target": 2.0}])
    assert read_questions(mapped, "input", "target") == [Question("one apple and one", "2.0", 1)]


ANSWERED = '{"question": "x", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.jsonl", None, "no such file: .*missing.jsonl"),
        ("a.csv", "x", r"type '.csv': expected one of .jsonl, .json, .parquet"),
        ("a.jsonl", '{"question": "q", "answer": "1"}\n\n{"question": oops}\n', "line 3 isn't JSON"),
        ("a.json", "[1, 2", "isn't JSON"),
        ("a.json", '{"question": "q"}', "holds a JSON dict: expected a list"),
        ("a.jsonl", "[1]\n", "row 1 is a list: expected an object"),
        ("a.jsonl", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.jsonl", '{"q": "x", "answer": "1"}', "no column question or problem; it has: q, answer. .*--question_c"),
        ("a.jsonl", '{"question": "x", "a": "1"}\n', "no column answer or solution; .*--answer_column"),
        ("a.jsonl", ANSWERED + '{"question": "", "answer": "1"}\n', "row 2 has nothing in"),
    ],
)
def test_bad_files(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / name)


def test_a_column_that_is_not_there(tmp_path):
    (tmp_path / "a.jsonl").write_text(ANSWERED)
    with pytest.raises(ValueError, match="--answer_column='gold' is not a col"):
        read_questions(tmp_path / "a.jsonl", answer_column="gold")


def test_hub_without_a_network_says_what_to_do():
    with pytest.raises(ValueError, match=r"'gsm8k' could not be loaded from the hub .*--dataset_path FILE"):
        hub_questions("gsm8k", held_out=False)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("72", "The answer is 72.", True),
        ("72", "72 apples", True),
        ("72", "The answer is 27.", False),
        ("72", "", False),
        ("72", "I don't know", False),
        ("Natalia sold 48/2 = 24.\n#### 72", "48 + 24 = 72\n#### 72", True),
        ("#### 1,234", "1234", True),
        ("#### 1234", "so it costs $1,234", True),
        ("#### -5", "-5", True),
        ("18", "\\boxed{18}, not 20", True),
        ("18", "#### 18\nthat is 9 twice", True),
        ("18", "first #### 17 then #### 18", True),
        (r"\frac{3}{4}", r"so \boxed{0.75}", True),
        (r"\frac{3}{4}", r"$\frac{6}{8}$", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \frac{\pi}{2})}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{3}", False),
        (r"We get \boxed{\frac{1}{2}}.", "1/2", True),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
        (r"\text{Evelyn}", r"\boxed{\text{Carla}}", False),
        ("2.0", "2", True),
        (r"\$32,\!348", "they pay $32,348", True),
        ("3, 5, 7", r"\boxed{3, 5, 7}", True),
        ("3, 5, 7", "7", False),
        ("1,-2", r"\boxed{1,-2}", True),
    ],
)
def test_judging(gold, answer, right):
    assert is_correct(gold, answer) is right


def test_few_shot_completions_are_read_to_the_next_question():
    text = " 19\n\nQuestion: What is 2 + 2?\nAnswer: 4"
    assert Correctness()([text], ["19"]) == [0.0]
    assert Correctness(NEXT_QUESTION)([text], ["19"]) == [1.0]
    logged = {}
    chat = [[{"role": "assistant", "content": "19"}], [{"role": "assistant", "content": "20"}]]
    assert Correctness()(chat, ["19", "19"], log_metric=logged.__setitem__) == [1.0, 0.0]
    assert logged == {"accuracy": 0.5}


def test_marked_answers():
    texts = [r"so \boxed{7}", "#### 7", "7", r"\boxed{}", "####"]
    assert MarkedAnswer()(texts) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_never_from_a_thread():
    """There math-verify's time limit can't work, and every answer would count as wrong."""
    raised = []

    def judge():
        try:
            is_correct("31415", "31415")
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert raised and "main thread only" in raised[0]
    assert is_correct("31415", "31415")


def test_bad_gold_is_reported_with_its_row():
    warned = []
    questions = [Question("a", "3", 1), Question("b", "no number at all here", 2), Question("c", "#### 4", 7)]
    assert [q.row for q in drop_bad_gold(questions, "my.jsonl", warned.append)] == [1, 7]
    assert warned == ["my.jsonl: 1 of 3 gold answers can't be parsed and are left out (rows 2)"]
    with pytest.raises(ValueError, match=r"my.jsonl: none of the 1 gold answers can be parsed .*row 2"):
        drop_bad_gold(questions[1:2], "my.jsonl", warned.append)


def test_gold_is_parsed_once():
    parse_gold.cache_clear()
    for _ in range(3):
        is_correct("77", f"the answer {_} is 77")
    assert parse_gold.cache_info().misses == 1


def test_prompts():
    examples = [Question("1 + 1?", "It is <<1+1=2>>2\n#### 2", 1)]
    prompt = few_shot_prompt("2 + 3?", examples)
    assert prompt == "Question: 1 + 1?\nAnswer: It is 2\n#### 2\n\nQuestion: 2 + 3?\nAnswer:"
    chat = build_dataset([Question("2 + 3?", "5", 1)], "chat", instruction="Be brief.")
    assert chat[0]["prompt"] == [{"role": "user", "content": "2 + 3?\nBe brief."}] and chat[0]["gold"] == "5"
    shots = build_dataset([Question("2 + 3?", "5", 1)], "few_shot", examples=examples)
    assert shots[0]["prompt"] == prompt


def test_holding_out():
    questions = [Question(str(i), str(i), i) for i in range(10)]
    train, held_out = hold_out(questions, 3, seed=0)
    assert sorted(q.row for q in train + held_out) == list(range(10)) and len(held_out) == 3
    assert hold_out(questions, 3, seed=0) == (train, held_out)
    with pytest.raises(ValueError, match="eval_size=10 leaves nothing to train on"):
        hold_out(questions, 10, seed=0)


def test_real_gsm8k_and_math(real_data):
    gsm8k = read_questions(real_data / "gsm8k" / "test.jsonl")
    warned = []
    assert len(drop_bad_gold(gsm8k, "gsm8k", warned.append)) == len(gsm8k) == 1319 and not warned
    right = Correctness()([q.answer for q in gsm8k[:100]], [q.answer for q in gsm8k[:100]])
    assert sum(right) == 100
    wrong = Correctness()([q.answer for q in gsm8k[1:101]], [q.answer for q in gsm8k[:100]])
    assert sum(wrong) <= 5  # neighbours with the same answer

    math500 = read_questions(real_data / "math500" / "test.jsonl")
    good = drop_bad_gold(math500, "math500", warned.append)
    assert len(good) == 500
    rows = map(json.loads, (real_data / "math500" / "test.jsonl").read_text().splitlines())
    solutions = {row["problem"].strip(): row["solution"] for row in rows}
    solved = Correctness()([solutions[q.question] for q in good], [q.answer for q in good])
    assert sum(solved) >= 498  # the data set's own solutions, judged against its own answers
