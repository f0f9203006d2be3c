"""The documentation's limits, snippets and commands: pages stay short, and what they show runs."""

import ast
import csv
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from pages import DOCS, ROOT, blocks
from processes import start

from trl_ext import read_interference
from trl_ext._version_check import TESTED_TRL

words, versions = (runpy.run_path(str(ROOT / ".ci" / f"{name}.py")) for name in ("words", "versions"))
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


# ---- length


def test_the_docs_are_short():
    counted = words["counts"]()
    assert sum(counted.values()) <= words["MOST_IN_ALL"]
    assert {name: number for name, number in counted.items() if number > words["MOST_ON_A_PAGE"]} == {}


def test_the_readme_s_first_screen_has_what_one_gets_and_no_link():
    lines = (ROOT / "README.md").read_text().splitlines()
    first_link = next(i for i, line in enumerate(lines) if re.search(r"(?<!!)\[[^]]*\]\(", line))
    screen = "\n".join(lines[:first_link])
    assert first_link <= 40 and all(part in screen for part in ("```diff", "make demo", "docs/report.png"))
    assert len([line for line in lines[:first_link] if line.startswith("* **")]) == 3
    assert words["words"](ROOT / "README.md") <= 700


def test_sentences_are_found_and_counted(tmp_path):
    page, long = tmp_path / "page.md", " ".join(["word"] * 36)
    page.write_text(f"# {long}\n\nShort. Another, `{long}`\n\n* {long}.\n* Fine.\n\n| {long} |\n\n```\n{long}\n```\n")
    assert [len(one.split()) for one in words["too_long"](page)] == [37, 37]
    glossary = tmp_path / "glossary.md"
    glossary.write_text("Three words here.\n\n| `reward` | mean |\n")
    assert words["words"](glossary) == 3


# ---- snippets


def kernel_inputs() -> dict:
    """What the snippet of the kernels' page takes as given: two sequences of three tokens each."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_NH": torch.randn(6, 8, generator=generator, requires_grad=True),
        "lm_head": torch.nn.Linear(8, 16, bias=False),
        "targets_N": torch.arange(6),
        "sequence_N": torch.tensor([0, 0, 0, 1, 1, 1]),
        "advantages_B": torch.tensor([1.0, -1.0]),
        "weights_B": torch.full((2,), 1 / 6),
        "old_logprobs_N": torch.full((6,), -2.5),
        "ref_logprobs_N": torch.full((6,), -2.5),
    }


def run_snippets(page: Path, model: Path) -> None:
    """All of a page's Python, one block after the other in one namespace, with our smallest model and one step."""
    code = "\n".join(blocks(page, "python")).replace("Qwen/Qwen2.5-0.5B-Instruct", str(model))
    code = re.sub(r"max_steps=\d+", "max_steps=1, save_steps=1", code)
    given = kernel_inputs() if page.name == "kernels.md" else {}
    exec(compile(code, page.name, "exec"), {"__name__": "__main__", **given})


def test_the_readme_s_recorder_records(tmp_path, monkeypatch):
    """With a model, a loss and micro-batches of one's own."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(3, 1)
    batch = {"x": torch.randn(4, 3), "group_id": torch.tensor([0, 0, 1, 1])}
    batch |= {"reward": torch.tensor([0.0, 1.0, 1.0, 0.0]), "advantage": torch.tensor([-1.0, 1.0, 1.0, -1.0])}
    names = {
        "model": model,
        "micro_batches": [batch],
        "loss": lambda model, of: (model(of["x"])[:, 0] * of["advantage"]).sum(),
    }
    (snippet,) = blocks(PAGES[0], "py")
    exec(snippet, names)
    assert len(read_interference(tmp_path / "runs/mine")) == 1
    assert "interference/cos_mean" in names["recorder"].metrics()


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")], ids=lambda page: page.stem)
def test_a_page_s_snippets_run(page, warm_policy, tmp_path):
    run = tmp_path / "runs" / "rate-1e-4"
    run.mkdir(parents=True)
    (run / "log_history.jsonl").write_text('{"eval_accuracy": 0.25}\n{"reward": 1.0}\n{"eval_accuracy": 0.75}\n')
    started = start(1, run_snippets, page, warm_policy, folder=tmp_path / "output", cwd=tmp_path)
    assert started.finish() == [0], started.text()[-3000:]
    if page.stem == "learning-rate":
        assert started.text().strip().endswith("0.500  rate-1e-4")


# ---- commands


def commands(page: Path) -> list[str]:
    """The shell commands of a page, one a line; a backslash or indentation goes on."""
    text = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    return [" ".join(line[2:].split("  #")[0].split()) for line in text.splitlines() if line.startswith("$ ")]


def known_options(script: str) -> set[str]:
    """The options of a script of ours or of ``python -m trl_ext``."""
    from trl import ModelConfig

    from trl_ext import CurvatureGRPOConfig

    if script == "examples/math.py":
        source = ast.parse((ROOT / script).read_text())
        (own,) = [node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "MathArguments"]
        names = {node.target.id for node in own.body if isinstance(node, ast.AnnAssign)}
        names |= {one.name for kind in (CurvatureGRPOConfig, ModelConfig) for one in fields(kind)}
        return {f"--{name}" for name in names} | {"--config", "--help", "--help_all"}
    if script == "trl_ext":
        text = "".join(path.read_text() for path in (ROOT / "trl_ext").glob("*/*command.py"))
    else:
        text = (ROOT / script).read_text() + "".join(p.read_text() for p in (ROOT / script).parent.glob("*.py"))
    return set(re.findall(r'"(--?[a-z][a-z_-]*)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_is_there(page):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in commands(page):
        for part in re.split(r"[;|&]+", command):
            parts = part.replace("'", "").replace('"', "").removeprefix(" do ").split()
            if parts[:1] == ["make"]:
                assert {one for one in parts[1:] if "=" not in one} <= targets, command
            script = next(
                (one for one in parts if re.fullmatch(r"(examples|benchmarks|tests)/[a-z_/]+\.py", one)), None
            )
            if script:
                assert (ROOT / script).exists(), command
            elif "trl_ext" in parts:
                script = "trl_ext"
            if "ablate" in parts:  # its own options come before the script's
                cut = parts.index("--") if "--" in parts else len(parts)
                own = {one for one in parts[:cut] if re.match(r"--[a-z]", one)}
                assert own <= known_options("trl_ext"), (command, own - known_options("trl_ext"))
                script = "examples/math.py"  # any script takes the trainer's options
                parts = [script, *parts[cut:]]
            if script in ("examples/math.py", "trl_ext") or (script and script.startswith("examples/")):
                given = {one for one in parts[parts.index(script) :] if re.match(r"--?[a-z]", one)}
                assert given <= known_options(script), (command, given - known_options(script))


def test_the_names_and_options_in_the_text_exist():
    """Logged names are in the glossary; options with two dashes belong to a script or a tool that pages name."""
    listed = set(re.findall(r"^\| `([^`]+)` \|", (DOCS / "glossary.md").read_text(), re.M))
    groups = {name.split("/")[0] for name in listed if "/" in name} - {"sampling"}
    math_options = known_options("examples/math.py") | known_options("trl_ext")
    tools = {"--num_processes", "--cpu", "--config_file", "--ratios-dir", "--full", "--benchmark-only", "--no-deps"}
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for code in re.findall(r"`([^`\n]+)`", text):
            if re.fullmatch(rf"({'|'.join(map(re.escape, groups))})/[a-z0-9_/<>]*[a-z0-9_>]", code):
                assert code in listed or f"{code}_mean" in listed, f"{page.name}: {code} isn't in the glossary"
            if code.startswith("--"):
                given = {one for one in code.split() if one.startswith("--") and one != "--"}
                assert given <= math_options | tools, f"{page.name}: {given - math_options}"


def test_files_in_the_text_exist():
    """A path in backticks is in the repository, unless a run or a command makes it."""
    roots = ("trl_ext/", "grpo_kernels/", "examples/", "tests/", "benchmarks/", "docs/")
    for page in PAGES:
        for code in re.findall(r"`([^`\n ]+)`", page.read_text()):
            if code.startswith(roots) and "<" not in code and not code.startswith("benchmarks/results"):
                assert (ROOT / code).exists(), f"{page.name}: {code}"


def test_the_decision_tree_s_commands_run(tmp_path):
    page = DOCS / "healthy-but-not-learning.md"
    lines = [line for line in commands(page) if line.startswith(("last ", "python -c"))]
    assert len(lines) >= 8
    (tmp_path / "sampled_completions.json").write_text('[{"prompt": "What is 1 + 1?", "answer": "2"}]')
    names = [line.split()[1] for line in lines if line.startswith("last ")]
    entry = ", ".join(f'"{name}": 0.5' for name in names)
    (tmp_path / "log_history.jsonl").write_text(f"{{{entry}}}\n")
    (function,) = [line for line in commands(page) if line.startswith("last()")]
    script = "\n".join(["set -e", f"RUN={tmp_path}", function, *lines]).replace("python -c", f"{sys.executable} -c")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert [f'"{name}": 0.5' in done.stdout for name in names] == [True] * len(names)
    assert "What is 1 + 1?" in done.stdout


# ---- arithmetic


def test_dead_prompts_are_as_the_formula_says():
    rows = re.findall(r"^\| (0\.\d+) \| (.*) \|$", (DOCS / "answers-and-prompts.md").read_text(), re.M)
    assert len(rows) == 6
    for pass_rate, cells in rows:
        p = float(pass_rate)
        assert cells.split(" | ") == [f"{p**G + (1 - p) ** G:.0%}" for G in (4, 8, 16, 32)]


# ---- versions


def test_what_is_said_to_work_has_run():
    rows = {row["environment"]: row for row in csv.DictReader((DOCS / "versions.csv").open())}
    ran = [
        row for row in rows.values() if row["failed"] == "0" and row["snippet"] == "runs" and int(row["passed"]) > 100
    ]
    (pinned,) = re.findall(r"^trl==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    assert set(TESTED_TRL) <= {pinned, *(row["trl"] for row in ran)}
    oldest = dict(pin.split("==") for pin in versions["lower_bounds"]())
    assert rows["oldest"] in ran and {name: Version(rows["oldest"][name]) for name in oldest} == {
        name: Version(number) for name, number in oldest.items()
    }
    assert all(f"| {row['environment']} |" in (DOCS / "versions.md").read_text() for row in rows.values())
