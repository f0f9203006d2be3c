"""Logs of other libraries (``tests/data/logs``, made by their writers): what is read, and the verdicts on it."""

import json
import math
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from run_folders import log_of, page_of

from trl_ext.report.command import main
from trl_ext.report.configuration import OWN_FUNCTION, SHARED, trl_options
from trl_ext.report.foreign.names import TABLE, is_ours
from trl_ext.report.foreign.tensorboard import masked_crc
from trl_ext.report.foreign.wandb import read
from trl_ext.report.groups import group_runs
from trl_ext.report.next_experiment import next_experiment
from trl_ext.report.read_run import read_run
from trl_ext.report.verdicts import diagnose

LOGS = Path(__file__).parents[1] / "data" / "logs"
OF_TRL = ["tensorboard", "run.wandb", "wandb_history.json", "wandb_history.csv", "trackio.db"]  # of the same run
VERDICTS = {
    **{name: {"mostly_dead": ("critical", 10), "fell": ("warning", 9)} for name in ("trl", *OF_TRL)},
    "verl.jsonl": {
        "length_limit": ("critical", 9),
        "not_finite": ("warning", 3),
        "entropy_collapse": ("warning", 9),
    },
    "prime_rl.jsonl": {"all_wrong": ("critical", 9), "fell": ("warning", 5)},
    "plain.csv": {"fell": ("warning", 50), "entropy_rise": ("warning", 110)},
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdicts_on_a_log_of_each_format(name):
    found = diagnose(read_run(LOGS / name))
    assert {one.name: (one.level, one.onset) for one in found.verdicts} == VERDICTS[name]


@pytest.mark.parametrize("name", OF_TRL)
def test_each_format_has_what_the_trainer_logged(name):
    """TRL's own state is the reference; TensorBoard keeps 32-bit numbers."""
    reference, run = read_run(LOGS / "trl"), read_run(LOGS / name)
    for metric in (
        "reward",
        "loss",
        "grad_norm",
        "entropy",
        "frac_reward_zero_std",
        "completions/mean_length",
        "epoch",
    ):
        assert run.series(metric)[0] == reference.series(metric)[0] == list(range(1, 19)), metric
        assert run.series(metric)[1] == pytest.approx(reference.series(metric)[1], rel=1e-6), metric
    for metric in ("eval_reward", "eval_runtime", "eval_samples_per_second", "rewards/reward/mean"):
        assert run.series(metric)[0] == reference.series(metric)[0], metric
        assert run.series(metric)[1] == pytest.approx(reference.series(metric)[1], rel=1e-6), metric
    assert read_run(LOGS / name).last_step == 18


def test_readers_agree_with_the_writers_own():
    """Where the packages are installed; else the test above is what there is."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    theirs = accumulator.EventAccumulator(str(LOGS / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    run = read_run(LOGS / "tensorboard")
    assert run.series("reward")[1] == [event.value for event in theirs.Scalars("train/reward")]


def test_rows_that_wandbs_own_reader_found():
    """``wandb_history.json`` is what ``wandb leet inspect`` printed of ``run.wandb``."""
    rows = json.loads((LOGS / "wandb_history.json").read_text())
    assert len(rows) > 100 and read(LOGS / "run.wandb").rows == rows


def test_wandbs_own_reader_finds_no_damage_and_the_same_configuration(tmp_path):
    pytest.importorskip("wandb.cli.leet")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(LOGS / "run.wandb")]
    environment = {**os.environ, "WANDB_ERROR_REPORTING": "false", "WANDB_CONFIG_DIR": str(tmp_path)}
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert found.returncode == 0 and not found.stderr, found.stderr
    records = [json.loads(line) for line in found.stdout.splitlines()]
    updates = [record["config"]["update"] for record in records if record["type"] == "config"]
    logged = read(LOGS / "run.wandb").config
    assert logged["generation_kwargs"] == {"sequence_bias": [[[1], 5.0]]}
    for name, value in {name: value for update in updates for name, value in update.items()}.items():
        assert logged[name] == value, name


def test_verl_and_prime_rl_under_our_names():
    verl, prime = read_run(LOGS / "verl.jsonl"), read_run(LOGS / "prime_rl.jsonl")
    assert verl.series("eval_accuracy")[0] == [0, 6, 12, 18] and verl.series("eval_accuracy")[1][0] == 0.25
    assert verl.series("reward")[0] == list(range(1, 19)) and verl.last("completions/max_length") == 16
    assert verl.curve("grad_norm").values[2] is None, "null, as orjson writes NaN"
    assert not verl.series("kl")[0] and not verl.series("loss")[0] and not verl.series("epoch")[0]
    # five lines a step by two processes, and evaluations that end after later steps
    assert prime.series("reward")[0] == prime.series("grad_norm")[0] == list(range(1, 19))
    assert prime.series("eval_reward")[0] == [2, 8, 14] and not prime.series("step_time")[0]
    # two environments. The reward is that of all answers; answers with an advantage keep one right in eight
    rows = [json.loads(line) for line in (LOGS / "prime_rl.jsonl").read_text().splitlines()]
    (last,) = [row for row in rows if row["step"] == 18 and "train/agg/all/agent/reward/mean" in row]
    assert "train/math/all/agent/reward/mean" in rows[0]
    assert last["train/agg/all/agent/reward/mean"] < 0.005 < 0.1 < last["train/agg/effective/agent/reward/mean"]
    assert prime.last("reward") == last["train/agg/all/agent/reward/mean"]
    truncated = last["train/agg/all/agent/stop_condition/generation_truncated"]
    assert 0 < prime.last("completions/clipped_ratio") == truncated
    assert prime.last("completions/max_length") == 256 and prime.series("normalization/all_right_frac")[0]


def test_agents_and_environments_of_prime_rl(tmp_path):
    """An environment's name may have a slash; of two agents none is taken for the other."""
    names = ["train/agg/all/solver/reward/mean", "train/agg/all/judge/reward/mean", "eval/a/b/effective/solver/avg@4"]
    log = log_of(tmp_path / "run", [{"step": i, **dict.fromkeys(names, 0.5)} for i in range(4)]) / "log_history.jsonl"
    assert read_run(log).series("eval_reward")[0] and not read_run(log).series("reward")[0]
    assert "choose one by --names" in read_run(log).problems[0]


def test_every_target_of_the_table_is_a_metric_of_ours():
    assert all(is_ours(ours) for ours in TABLE.values())


@pytest.mark.parametrize("name", VERDICTS)
def test_what_cannot_be_told_names_what_is_missing(name, capsys):
    with pytest.raises(SystemExit):
        main(["check", str(LOGS / name)])
    printed = " ".join(capsys.readouterr().out.split())
    for signature, reason in diagnose(read_run(LOGS / name)).unknown.items():
        assert reason in printed
        few, files = "fewer than 30 rewards in the log", "the run has no interference files"
        assert "in the log" in reason or reason.startswith((few, files)), (signature, reason)


# ---- the configuration


def with_configuration(folder: Path, **changes) -> Path:
    """A copy of trackio's log with other options."""
    file = Path(shutil.copy(LOGS / "trackio.db", folder / "project.db"))
    with closing(sqlite3.connect(file)) as database, database:
        (config,) = database.execute("SELECT config FROM configs").fetchone()
        database.execute("UPDATE configs SET config = ?", [json.dumps({**json.loads(config), **changes})])
    return file


def test_wandb_and_trackio_have_the_trainers_options():
    """Two writers' copies of the same; the reference is what ``make_logs.py`` sets."""
    config = read_run(LOGS / "run.wandb").config
    set_there = {"num_generations": 4, "per_device_train_batch_size": 32, "max_completion_length": 8, "max_steps": 18}
    set_there |= {"optim": "sgd", "learning_rate": 0.02, "scale_rewards": "group", "model_name_or_path": "policy"}
    assert config == read_run(LOGS / "trackio.db").config and set_there.items() <= config.items()
    assert not read_run(LOGS / "wandb_history.json").config and not read_run(LOGS / "tensorboard").config


def test_verdicts_and_the_next_experiment_read_them(tmp_path):
    """Of 2 groups a step, 9 dead steps are too few for a verdict; of 8 they are enough."""
    run = read_run(LOGS / "trackio.db")
    assert next_experiment(run, diagnose(run))[0].option == "learning_rate=0.01"
    few = diagnose(read_run(with_configuration(tmp_path, generation_batch_size=8)))
    assert "mostly_dead" not in {one.name for one in few.verdicts}


def test_a_configuration_of_a_folder(tmp_path):
    shutil.copy(LOGS / "run.wandb", tmp_path / "run-1.wandb")
    assert read_run(tmp_path).config["learning_rate"] == 0.02
    (tmp_path / "run_config.json").write_text('{"learning_rate": 1}')
    assert read_run(tmp_path).config == {"learning_rate": 1}, "the folder's own comes first"


def test_nothing_private_of_a_logged_configuration_is_read(tmp_path):
    private = {"_name_or_path": "/home/alice/models/small-7b", "output_dir": "/home/alice/first", "run_name": "alice-1"}
    private |= {
        "hub_model_id": "alice/secret",
        "vllm_server_host": "10.0.0.7",
        "_Username": "alice",
        "_Group": "secret",
    }
    private |= {"optim": "/home/alice/mine.py", "reward_weights": ["/secret"], "normalization": "secret"}
    file = with_configuration(tmp_path, **private)
    config = read_run(file).config
    assert config["model_name_or_path"] == "small-7b" and config["num_generations"] == 4
    assert not config.keys() & {"optim", "reward_weights", "normalization"} and set(config) <= set(SHARED)
    for page in (page_of(file, folder=tmp_path), page_of(file, "--bundle", folder=tmp_path)):
        assert "small-7b" in page and not [word for word in ("alice", "secret", "10.0.0.7") if word in page]
    of_wandb = tmp_path / "run.wandb"
    of_wandb.write_bytes((LOGS / "run.wandb").read_bytes().replace(b"models/policy", b"/alice/policy"))
    assert read(of_wandb).config["_name_or_path"] == "/alice/policy"
    assert read_run(of_wandb).config["model_name_or_path"] == "policy"
    assert "alice" not in page_of(of_wandb, folder=tmp_path)


def test_whose_options_are_taken():
    trl = {"num_generations": 4, "per_device_train_batch_size": 8}
    assert not trl_options({"num_generations": 4, "learning_rate": 0.1}), "not a run of TRL's"
    assert trl_options({**trl, "scale_rewards": True})["scale_rewards"] == "group"
    model = {"normalization": "rms", "adapter": "yes"}  # of a model's own configuration
    assert trl_options({**trl, **model}) == trl
    assert trl_options({**trl, "interference_every": 0, "normalization": "rank"})["normalization"] == "rank"
    assert trl_options({**trl, "interference_every": 0, "normalization": "/a.py:b"})["normalization"] == OWN_FUNCTION


@pytest.mark.parametrize(
    "change", ["UPDATE configs SET config = '{'", "UPDATE configs SET config = 'null'", "DROP TABLE configs"]
)
def test_a_configuration_that_cannot_be_read_costs_no_metric(change, tmp_path):
    file = Path(shutil.copy(LOGS / "trackio.db", tmp_path / "project.db"))
    with closing(sqlite3.connect(file)) as database, database:
        database.execute(change)
    assert read_run(file).last_step == 18 and not read_run(file).config


def test_options_that_wandb_removes(tmp_path):
    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 & 0x7F | 2 | (0x80 if number > 15 else 0), *([number >> 4] * (number > 15))]) + (
            bytes([len(data)]) + data
        )

    def item(name: bytes, value: bytes = b"") -> bytes:
        return field(1, name) + (field(16, value) if value else b"")

    first = field(17, field(4, field(1, item(b"a", b"1")) + field(1, item(b"b", b"2"))))  # wandb.init(config=...)
    records = [first, field(5, field(1, item(b"c", b"[3]")) + field(2, item(b"a")))]
    pieces = [struct.pack("<IHB", 0, len(record), 1) + record for record in records]
    (tmp_path / "run.wandb").write_bytes(b":W&B" + bytes(3) + b"".join(pieces))
    assert read(tmp_path / "run.wandb").config == {"b": 2, "c": [3]}


def test_runs_with_a_part_of_their_configuration_are_not_taken_for_seeds_of_one(tmp_path):
    """TRL's options don't name the reward or the data."""
    runs = [read_run(LOGS / "trackio.db"), read_run(with_configuration(tmp_path, seed=8))]
    assert runs[0].config.keys() == runs[1].config.keys() and len(group_runs(runs)) == 2


# ---- a user's own names


def names(tmp_path, **table):
    (tmp_path / "names.json").write_text(json.dumps(table))
    return str(tmp_path / "names.json")


def test_names_of_ones_own(tmp_path, capsys):
    log = tmp_path / "run.csv"
    log.write_text("iteration,score\n" + "".join(f"{5 * i},{0.5 - i / 50}\n" for i in range(1, 21)))
    table = names(tmp_path, iteration="step", score="reward")
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(log), "--names", table])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "run, up to step 100" in printed and "reward is score" in printed and "being lost" in printed
    page_of(log, "--names", table, folder=tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "rewrd"}, "'a' can't be 'rewrd', which is no metric of ours; near: reward"),
        ({"a": 1}, "must hold"),
        ([], "must hold"),
        (None, "can't be read as names"),
    ],
)
def test_a_table_that_is_wrong(table, message, tmp_path, capsys):
    file = tmp_path / "names.json"
    file.write_text("{" if table is None else json.dumps(table))
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(LOGS / "plain.csv"), "--names", str(file)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_two_names_of_one_metric_are_a_question(tmp_path):
    rows = [{"step": i, "val-core/a/acc/mean@1": 0.1, "val-core/b/acc/mean@1": 0.9, "reward": 0.5} for i in range(4)]
    run = read_run(log_of(tmp_path / "run", rows) / "log_history.jsonl")
    assert not run.series("eval_accuracy")[0] and "choose one by --names" in run.problems[0]
    chosen = read_run(tmp_path / "run" / "log_history.jsonl", {"val-core/b/acc/mean@1": "eval_accuracy"})
    assert chosen.series("eval_accuracy")[1] == [0.9] * 4 and not chosen.problems


def test_a_percentage_is_not_taken_as_a_share(tmp_path):
    rows = [{"step": i, "response_length/clip_ratio": 37.5, "actor/entropy": 210.0, "reward": 0.5} for i in range(4)]
    run = read_run(log_of(tmp_path / "run", rows) / "log_history.jsonl")
    assert not run.series("completions/clipped_ratio")[0] and not run.series("entropy")[0]
    assert len(run.problems) == 2 and "it should lie in [0, 1] and is 37.5" in " ".join(run.problems)


# ---- formats, folders, and what is no log


def test_a_folder_with_several_takes_what_reaches_furthest(tmp_path):
    """A run of TRL's own trainer that was killed after its last checkpoint: TensorBoard has the later steps."""
    state = json.loads((LOGS / "trl" / "trainer_state.json").read_text())
    state["log_history"] = [entry for entry in state["log_history"] if entry["step"] <= 12]
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text(json.dumps(state))
    shutil.copytree(LOGS / "tensorboard", tmp_path / "runs" / "Nov30_12-00-00_host")
    run = read_run(tmp_path)
    assert run.last_step == 18 and "TensorBoard" in run.source and "it goes to step 12" in run.problems[0]
    state["log_history"].append({"step": 40, "loss": 0.0})
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text(json.dumps(state))
    assert read_run(tmp_path).last_step == 40 and not read_run(tmp_path).source


def test_a_folder_of_trackios_and_an_event_file_without_its_host(tmp_path):
    shutil.copy(LOGS / "trackio.db", tmp_path / "project.db")
    assert read_run(tmp_path).last_step == 18
    folder = shutil.copytree(LOGS / "tensorboard", tmp_path / "Nov30_12-00-00_host")
    (file,) = folder.glob("events*")
    assert read_run(file).name == read_run(folder).name == "Nov30_12-00-00"


def test_a_database_with_two_runs(tmp_path):
    file = Path(shutil.copy(LOGS / "trackio.db", tmp_path / "project.db"))
    with sqlite3.connect(file) as database:
        columns = "timestamp, run_id, step, metrics"
        database.execute(
            f"INSERT INTO metrics ({columns}, run_name) SELECT timestamp, 'two', step, metrics, 'two' FROM metrics"
        )
    with pytest.raises(ValueError, match=r"has 2 runs, .*, two: give one as .*project.db#"):
        read_run(file)
    assert read_run(f"{file}#two").last_step == 18
    with pytest.raises(ValueError, match="no run 'three'"):
        read_run(f"{file}#three")


@pytest.mark.parametrize("name", ["tensorboard", "run.wandb", "verl.jsonl", "prime_rl.jsonl"])
def test_a_log_that_is_cut_anywhere_is_read_up_to_there(name, tmp_path):
    """Of a run that is still going, or was killed."""
    source = LOGS / name
    source = next(source.glob("events*")) if source.is_dir() else source
    data, file = source.read_bytes(), tmp_path / source.name
    for share in (0.4, 0.7, 0.9, 0.999):
        file.write_bytes(data[: int(share * len(data))])
        reached = read_run(file).series("reward")[0]
        assert reached == list(range(1, len(reached) + 1)) and 20 * share - 5 < len(reached) <= 18


def test_a_run_that_went_on_has_each_step_once(tmp_path):
    """Two event files: the second begins where the last checkpoint was."""
    rows = [{"step": i, "reward": 0.5} for i in range(1, 9)] + [{"step": i, "reward": 0.9} for i in (5, 6)]
    run = read_run(log_of(tmp_path / "run", rows) / "log_history.jsonl")
    assert run.series("reward") == ([1, 2, 3, 4, 5, 6], [0.5] * 4 + [0.9] * 2)


def test_other_shapes_of_json_and_csv(tmp_path):
    columns = {"_step": {"0": 0, "1": 1}, "train/reward": {"0": 0.25, "1": "NaN"}}
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    assert read_run(tmp_path / "columns.json").curve("reward").values == [0.25, None]
    chart = '"Step","run - train/reward","run - train/reward__MIN","run - train/reward__MAX"\n"1","0.5","0.4","0.6"\n'
    (tmp_path / "chart.csv").write_text(chart)
    assert read_run(tmp_path / "chart.csv").series("reward") == ([1], [0.5])
    (tmp_path / "chart.csv").write_text('"Step","a - train/reward","b - train/reward"\n"1","0.5","0.4"\n')
    with pytest.raises(ValueError, match=r"curves of several runs \(a, b\)"):
        read_run(tmp_path / "chart.csv")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\x00\x01\x02\xff" * 100, "neither JSON nor a table"),
        (b"SQLite format 3\0" + b"\0" * 100, "not trackio's"),
        (b"hello\nworld\n", "neither JSON nor a table"),
        (b'{"a": ', "neither JSON nor lines of JSON"),
        (b"[1, 2]", "no step in most of its 0 rows"),
        (b'{"step": 1, "tokens": 5}\n', "none of its names is known: tokens"),
        (b"a,b\n1,2\n", "no step in most of its 1 rows, which have a, b"),
        (b"step;reward\n1;0,5\n", "it has no numbers under its names reward"),
        (b"step,reward\n1," + b"9" * 200_000, "neither JSON nor CSV: field larger"),
        (b'{"_step": 5, "_wandb": {}, "train/reward": 1}', "W&B's summary"),
    ],
)
def test_what_is_no_log_gets_one_clear_error(content, reason, tmp_path, capsys):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(tmp_path / "file")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and reason in error and error.count("\n") == 1
    assert "Looked for: TRL's trainer_state.json, TensorBoard's event files" in error


def test_a_log_in_utf_16(tmp_path):
    """What ``>`` of Windows' shell writes."""
    for name in ("plain.csv", "verl.jsonl"):
        (tmp_path / name).write_bytes((LOGS / name).read_text().encode("utf-16"))
        assert read_run(tmp_path / name).logs == read_run(LOGS / name).logs


def test_steps_that_occur_twice_are_named(tmp_path):
    """Of two runs in one file, the values of the later one count."""
    first = [{"step": step, "reward": 0.1, "epoch": step} for step in range(1, 6)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first + first[-1:]))
    assert read_run(tmp_path / "log.jsonl").problems == []
    second = [{**row, "reward": 0.9} for row in first]
    for rows in (first + second, [row for both in zip(first, second, strict=True) for row in both]):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = read_run(tmp_path / "log.jsonl")
        assert run.series("reward")[1] == [0.9] * 5
        assert "5 values are left out, as later ones are of the same steps" in run.problems[0]


@pytest.mark.parametrize("metrics", ["null", "[1]", "half"])
def test_a_row_of_trackios_that_cannot_be_read_costs_no_other(metrics, tmp_path):
    file = Path(shutil.copy(LOGS / "trackio.db", tmp_path / "project.db"))
    with closing(sqlite3.connect(file)) as database:
        database.execute(f"UPDATE metrics SET metrics = '{metrics}' WHERE id = (SELECT min(id) FROM metrics)")
        database.commit()
    assert read_run(file).last_step == 18


def test_a_folder_without_a_log_says_why(tmp_path, capsys):
    (tmp_path / "data.csv").write_text("question,answer\n1 + 1,2\n")
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path)])
    assert "data.csv: no step in most of its 1 rows" in capsys.readouterr().err


def test_numbers_that_json_does_not_have(tmp_path):
    rows = [{"step": 1, "reward": "NaN"}, {"step": 2, "reward": "-Infinity"}, {"step": 3, "reward": True}]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {"step": 4, "reward": 1}]))
    run = read_run(tmp_path / "log.jsonl")
    assert [entry["reward"] for entry in run.logs][1:] == [-math.inf, 1.0] and math.isnan(run.logs[0]["reward"])


def test_a_damaged_scalar_of_an_event_file_is_one_error(tmp_path):
    def record(data):
        length = struct.pack("<Q", len(data))
        return length + struct.pack("<I", masked_crc(length)) + data + bytes(4)

    value = b"\x0a\x01r" + b"\x11" + bytes(8)  # tag = "r", simple_value of 8 bytes
    summary = b"\x0a" + bytes([len(value)]) + value
    (tmp_path / "events.out.tfevents.1.0").write_bytes(record(b"\x10\x01\x2a" + bytes([len(summary)]) + summary))
    with pytest.raises(ValueError, match="a scalar that isn't a float"):
        read_run(tmp_path / "events.out.tfevents.1.0")
