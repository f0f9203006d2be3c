"""``make gpu``: parts that are killed, crash or miss a peer, and the page. What is timed is nothing's business here."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from processes import ROOT, environment

sys.path.append(str(ROOT / "benchmarks"))

import head_contenders
import torch
from gpu import __main__ as runner
from gpu import heads, page
from gpu.record import PartFile, Record, Row, read
from gpu.setting import Setting

# a part of three cases; each appends what it runs to the file "ran"
PART = """
import os, sys, time
from pathlib import Path
from gpu.record import PartFile, Record
folder = Path(sys.argv[1])
file = PartFile.load(folder / "part.json", "part", "key")
record = Record(file, 1)
for case in record.open_cases(["first", "second", "third"]):
    for contender in record.untried(case, ["ours", "peer", "missing"]):
        with record.attempt(case, contender):
            with (folder / "ran").open("a") as ran:
                print(case, contender, file=ran)
            if contender == "missing":
                import a_module_that_nobody_has
            if (case, contender) == ("second", "peer"):
                exec((folder / "what").read_text())
            record.add(case, contender, {"ms": 1.0})
file.state = "done"
record.save()
"""


class Run(runner.Run):
    def command(self, name, *options):
        return [sys.executable, "-c", PART, str(self.out)]


def run_part(folder, what: str) -> PartFile:
    (folder / "what").write_text(what)
    state = runner.run_part(Run(folder, 8.0, 1.0, True, "cpu"), "part", "key")
    found = read(folder / "part.json")
    assert found.state == state
    return found


def notes(file: PartFile) -> dict[tuple[str, str], str]:
    return {row.place: row.note for row in file.all_rows}


def ran(folder) -> list[str]:
    return (folder / "ran").read_text().splitlines()


def test_a_peer_that_ends_the_process_is_recorded_and_the_part_is_finished(tmp_path):
    found = run_part(tmp_path, "os.kill(os.getpid(), 9)")
    assert found.state == "done"
    assert found.done == ["first", "second", "third"]
    assert notes(found)["second", "peer"] == "the process ended with -9"
    assert notes(found)["second", "ours"] == notes(found)["third", "peer"] == ""
    assert ran(tmp_path).count("first ours") == 1
    assert ran(tmp_path).count("second peer") == 1


def test_a_peer_that_is_missing_or_raises_is_recorded_with_its_reason(tmp_path):
    found = run_part(tmp_path, "raise ValueError('H must be even\\nand more')")
    assert found.state == "done"
    assert notes(found)["second", "peer"] == "ValueError: H must be even"
    assert notes(found)["first", "missing"].startswith("ModuleNotFoundError: No module named")
    assert len(found.rows) == 9


def test_an_error_of_cuda_starts_a_new_process_without_the_contender(tmp_path):
    found = run_part(tmp_path, "raise RuntimeError('CUDA error: an illegal memory access was encountered')")
    assert found.state == "done"
    assert "illegal memory access" in notes(found)["second", "peer"]
    assert ran(tmp_path).count("second ours") == 2  # its first process couldn't go on


def test_a_part_whose_time_is_up_goes_on_where_it_was(tmp_path, monkeypatch):
    def wait(process, timeout=None, plain=subprocess.Popen.wait):
        """The time is up as soon as the peer sleeps."""
        while timeout is not None and not (tmp_path / "asleep").exists():
            time.sleep(0.01)
        if timeout is not None:
            raise subprocess.TimeoutExpired("part", timeout)
        return plain(process)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess.Popen, "wait", wait)
        found = run_part(tmp_path, "(folder / 'asleep').touch(); time.sleep(600)")
    assert found.state == "time is up"
    assert found.done == ["first"]
    found = run_part(tmp_path, "raise AssertionError('not run again')")
    assert found.state == "done"
    assert notes(found)["second", "peer"] == "it was running when the part's time was up"
    assert ran(tmp_path).count("first ours") == 1


def test_rows_of_other_code_are_measured_anew(tmp_path):
    file = PartFile(tmp_path / "part.json", "part", "old", state="done", done=["first"])
    file.save()
    assert PartFile.load(file.path, "part", "new").done == []
    assert PartFile.load(file.path, "part", "old").done == ["first"]
    file.path.write_text("{")
    assert PartFile.load(file.path, "part", "old").done == []


@pytest.fixture
def one_case(tmp_path, monkeypatch):
    """A function that measures the contenders at a tiny size, and returns their rows."""

    def measure(contenders) -> dict[str, Row]:
        monkeypatch.setattr(head_contenders, "CONTENDERS", contenders)
        record = Record(PartFile(tmp_path / "head.json", "head", "key"), 1)
        options = {"frozen": False, "live": 1.0}
        small = head_contenders.make_problem("tiny", 32, torch.float32, **options)
        problem = head_contenders.make_problem("tiny", 16, torch.float32, **options)
        heads.run_case(record, "case", problem, small, 1.0, rounds=1)
        return {row.contender: row for row in record.file.rows}

    return measure


def test_the_head_against_peers_of_which_one_is_wrong_and_one_is_missing(one_case):
    all_of = head_contenders.CONTENDERS
    contenders = {name: all_of[name] for name in ("ours", "trl", "full logits", "torch cross entropy")}
    contenders |= {"QuACK": lambda problem: __import__("a_module_that_nobody_has")}
    found = one_case({**contenders, "wrong": lambda problem: 1.01 * head_contenders.ours(problem)})
    timed = {name for name, row in found.items() if "ms" in row.values}
    assert timed >= {"ours", "trl", "full logits", "floor"}
    assert found["ours"].values["error"] < 1e-5
    assert found["wrong"].note.startswith("AssertionError: its gradient is 0.01 from float64's")
    assert found["QuACK"].note.startswith("ModuleNotFoundError")
    assert found["trl"].values["/ floor"] == pytest.approx(found["trl"].values["ms"] / found["floor"].values["ms"])


def test_the_page_has_predictions_beside_measurements(tmp_path):
    case = "8192 x 4096 x 151936 bf16 trainable, live 1"
    file = PartFile(tmp_path / "head_7244.json", "head_7244", "key", state="done", done=[case])
    file.rows = [Row(case, "ours", {"ms": 47.25, "peak MiB": 3000.0}), Row(case, "QuACK", note="ModuleNotFoundError")]
    file.save()
    text = page.write(tmp_path, {"device": "H100"}, "key").read_text()
    lines = [line for line in text.splitlines() if line.startswith(f"| {case} | ours: ms ")]
    assert [cell.strip() for cell in lines[0].split("|")[3:6]] == ["45.2", "48.5", "47.2"]
    assert f"| {case} | ours: peak MiB | - | 4096 | 3000 |" in text
    assert "| QuACK | - | - | ModuleNotFoundError |" in text
    assert "Not run: tests," in text
    stale = page.write(tmp_path, {"device": "H100"}, "other").read_text()
    assert f"| {case} | ours: ms | 45.2 | 48.5 | - |" in stale
    assert "of other code, versions or another device" in stale


def test_every_prediction_is_of_a_case_that_is_measured():
    """At full size on a GPU, by the names that the parts make."""
    setting = type("OnGpu", (Setting,), {"device": "cuda", "dtype": torch.bfloat16})(False, 40.0)
    shapes = (("8B", 8192), ("Qwen2.5", 4096), ("Qwen2.5-1.5B", 4096), ("SmolLM2", 2048))
    cases = {case for shape in shapes for case in heads.cases(heads.HeadShape(*shape), setting)}
    from gpu import steps

    cases |= {steps.title("1.5B", True, setting, share) for share in steps.SHARES} | {"1.5B LoRA, a step's launches"}
    assert {prediction.case for prediction in page.predictions()} <= cases


def test_what_is_counted_of_a_profile():
    cpu, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    from gpu.counts import counted

    names = {
        "aten::mm": cpu,
        "cudaLaunchKernel": cpu,
        "cuLaunchKernelEx": cpu,
        "cudaStreamSynchronize": cpu,
        "gemm": gpu,
        "triton_fused": gpu,
        "Memcpy DtoH (Device -> Pinned)": gpu,
        "Memset (Device)": gpu,
    }
    events = [SimpleNamespace(name=name, device_type=device) for name, device in names.items()]
    events.append(SimpleNamespace(name="Optimizer.step", device_type=gpu, is_user_annotation=True))
    expected = {"kernels": 2, "launches": 2, "waits": 1, "copies to the host": 1, "ATen calls": 1}
    assert counted(events) == expected


@pytest.mark.nightly
def test_parts_at_tiny_sizes(tmp_path):
    """By command, as on a GPU: one part of each kind. A second run measures nothing."""
    parts = ["head_7244", "tests", "choose_1.5B_lora", "step_1.5B_lora", "launches_1.5B_lora", "kernels"]
    variables = [f"PYTHON={sys.executable}", "DEVICE=cpu", "TINY=1", f"OUT={tmp_path}", f"PARTS={' '.join(parts)}"]
    options = {"cwd": ROOT, "env": environment(OMP_NUM_THREADS="1"), "check": True}
    subprocess.run(["make", "gpu", *variables], **options)
    files = [read(path) for path in tmp_path.glob("*.json")]
    assert {file.name: file.state for file in files} == dict.fromkeys(parts, "done")
    best = [row for file in files for row in file.rows if row.contender == "best"]
    assert len(best) == 2
    again = subprocess.run(["make", "gpu", *variables], **options, capture_output=True, text=True)
    assert again.stdout.count("done before") == len(parts)
