"""Real engines, two CPU processes each: DeepSpeed's ZeRO-2 and ZeRO-3, and accelerate's FSDP2.

By ``accelerate launch`` with our configurations, one launch an engine for all its runs, on stored rollouts: against one
process, and against stock TRL in the same set-up. ``make test-engines``; without DeepSpeed its cases are skipped.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from processes import ROOT, environment
from safetensors.torch import load_file
from two_process_worker import assert_same_run

from trl_ext.tasks.small_policy import build_model, build_tokenizer

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed isn't installed")
ENGINES = [pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed), "fsdp2"]
ROUNDING = 6e-8  # of a weight near 1 in float32: differences below are one rounding's
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
# a rank at which DeepSpeed takes the head's adapter apart too: smaller tensors stay whole on every process
ON_HEAD = {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "lm_head"]}
# torch can't load a full state dict of an optimizer without a state, as plain SGD's
SAVED = {
    **{"optim": "adamw_torch", "learning_rate": 1e-3, "normalization": "running_std", "interference_every": 2},
    **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
}
FOUR = {"gradient_accumulation_steps": 4, "steps_per_generation": 4}
CASES = {
    "full": {},
    "untied": {"model": "untied"},
    "lora": {"lora": LORA},
    "lora untied": {"lora": LORA, "model": "untied"},
    "lora on the head": {"model": "untied", "lora": ON_HEAD},
    "half dead": {"dead": 0.5, "options": {"gradient_accumulation_steps": 2}},
    "most dead": {"dead": 0.6, "options": {**FOUR, "max_steps": 4, "num_iterations": 2, "loss_type": "bnpo"}},
    "beta": {"options": {"beta": 0.04, "num_iterations": 2, "max_steps": 4}},
    "checkpointing": {"options": {"gradient_checkpointing": True}},
    "shared": {"dead": 0.5, "options": {"gradient_accumulation_steps": 2, "num_iterations": 2, "share_prompts": True}},
    "shared untied": {"model": "untied", "options": {"share_prompts": True, "beta": 0.04}},
    "shared checkpointing": {"options": {"gradient_checkpointing": True, "share_prompts": True}},
    "shared lora": {"lora": LORA, "options": {"share_prompts": True}},
    "interference": {"options": {"interference_every": 1}},
    "interference lora": {"lora": LORA, "dead": 0.5, "options": {"interference_every": 1}},
    "interference untied": {
        "model": "untied",
        "options": {"interference_every": 1, "gradient_accumulation_steps": 2, "share_prompts": True},
    },
}
OURS_ALONE = ("share_prompts", "interference_every", "normalization")
NOT_TRLS = ("lora on the head",)  # which it refuses
AGAINST_TRL_ALONE = ("most dead",)  # bnpo weighs by a process's own tokens: TRL's one process differs from its two


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> Path:
    """A folder with two of the built-in architecture: ``tied`` and ``untied``."""
    folder = tmp_path_factory.mktemp("policies")
    for name in ("tied", "untied"):
        tokenizer = build_tokenizer((1, 4))
        torch.manual_seed(0)
        model = build_model(tokenizer)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(0.1)
            if name == "untied":
                model.config.tie_word_embeddings = False
                model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def specification(policies, folder, engine, name, trainer, *, model="tied", options=(), **more):
    """What ``two_process_worker.train`` takes; ``more``: of its ``DEFAULTS``."""
    folder.mkdir(parents=True, exist_ok=True)
    if trainer == "ours":
        options = {"interference_every": 0, "share_prompts": False, **dict(options)}
    else:
        options = {key: value for key, value in dict(options).items() if key not in OURS_ALONE}
    out = str(folder / ("resumed" if "resume" in more else "result"))
    known = {"name": f"{name}-{trainer}", "trainer": trainer, "engine": engine, "folder": str(folder), "out": out}
    return {**known, "model": str(policies / model), "options": options, **more}


def launch(engine, *command):
    """What it printed; by accelerate with our configuration of the engine, or on one process."""
    python = Path(sys.executable)
    start = [str(python)]
    if engine != "one":
        configuration = ROOT / "examples" / "accelerate" / f"{engine}_cpu.yaml"
        start = [str(python.with_name("accelerate")), "launch", "--config_file", str(configuration)]
        start += ["--main_process_port", "0"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    command = [*start, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment(**quiet), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def train(engine, folder, specs):
    cases = folder / f"{engine}.json"
    cases.write_text(json.dumps(specs))
    return launch(engine, ROOT / "tests" / "engine_worker.py", cases)


@pytest.fixture(scope="module")
def runs(policies, tmp_path_factory):
    """``runs(engine)``: the folder with all runs of an engine, each launched once; also of ``one``, a process alone."""
    folder, done = tmp_path_factory.mktemp("engines"), {}

    def of(engine):
        if engine not in done:
            specs = []
            for name, case in CASES.items():
                for trainer in ("trl", "ours") if name not in NOT_TRLS else ("ours",):
                    place = folder / engine / f"{name}-{trainer}"
                    specs.append(specification(policies, place, engine, name, trainer, **case))
            for kind in ("FULL", "SHARDED") if engine == "fsdp2" else ("",):
                place = folder / engine / f"saved{kind}"
                set_kind = {"FSDP_STATE_DICT_TYPE": f"{kind}_STATE_DICT"} if kind else {}
                saved = {"options": SAVED, "environment": set_kind}
                specs.append(specification(policies, place, engine, f"saved{kind}", "ours", **saved))
                at = str(place / "checkpoint-2")
                specs.append(specification(policies, place, engine, f"resumed{kind}", "ours", resume=at, **saved))
            done[engine] = "failed before"
            done[engine] = train(engine, folder, specs)
        assert done[engine] != "failed before"  # what its own failure said
        return folder / engine

    return of


def parameters(folder, name, trainer, rank=0):
    return torch.load(folder / f"{name}-{trainer}" / f"result.{rank}.pt")["parameters"]


def logs(folder, name):
    kept = torch.load(folder / f"{name}-ours" / "result.0.pt")["logs"]
    return [log for log in kept if "reward" in log]


def distance(ours, theirs):
    assert set(ours) == set(theirs)
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


@pytest.mark.engines
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_run(engine, name, runs, policies):
    """Parameters after training: as far from one process's as TRL's own are, and as near to TRL's."""
    here, alone = runs(engine), runs("one")
    if name not in NOT_TRLS:  # the log too, and the advantages
        assert_same_run(*(torch.load(here / f"{name}-{whose}" / "result.0.pt") for whose in ("ours", "trl")))
    ours, single = parameters(here, name, "ours"), parameters(alone, name, "ours")
    of_trl = name if name not in NOT_TRLS else "lora untied"
    theirs = parameters(here, of_trl, "trl")
    if name in AGAINST_TRL_ALONE:
        bound = 3 * ROUNDING
    else:
        bound = 3 * max(distance(theirs, parameters(alone, of_trl, "trl")), ROUNDING)
        assert distance(ours, single) <= bound
    if of_trl == name:
        assert distance(ours, theirs) <= bound
    case = CASES[name]
    start = load_file(policies / case.get("model", "tied") / "model.safetensors")
    moved = {key: value for key, value in single.items() if "lora_B" in key}  # 0 at first
    moved = moved or {key: value - start[key] for key, value in single.items() if key in start}
    assert max(value.abs().max().item() for value in moved.values()) > 100 * bound
    assert not any(value.abs().max() == 0 for value in moved.values())


@pytest.mark.engines
@pytest.mark.parametrize("engine", ENGINES)
def test_sharing_and_skipping_really_ran(engine, runs):
    here, alone = runs(engine), runs("one")
    for name in ("half dead", "shared", "shared untied", "shared checkpointing", "shared lora"):
        for log, of_one in zip(logs(here, name), logs(alone, name), strict=True):
            saved = log["compute/flops_saved_frac"]
            assert saved == pytest.approx(of_one["compute/flops_saved_frac"], abs=0.1)  # groups split over processes
            assert saved > (0.4 if "shared" in name else 0.5)
    for log, full in zip(logs(here, "shared lora"), logs(here, "full"), strict=True):
        assert log["compute/flops_saved_frac"] > full["compute/flops_saved_frac"] + 0.2


@pytest.mark.engines
@pytest.mark.parametrize("name", [name for name in CASES if "interference" in name])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_interference(engine, name, runs):
    """Every layer is followed, the sketch is checked against the engine's gradient, and all is one process's."""
    here, alone = logs(runs(engine), name), logs(runs("one"), name)
    assert len(here) == 3
    for log, of_one in zip(here, alone, strict=True):
        assert log["interference/coverage"] == pytest.approx(1, abs=1e-6)
        assert log["interference/sketch_check"] == pytest.approx(1, abs=0.1)
        measured = [key for key in of_one if key.startswith(("interference/", "curvature/", "what_if/", "noise/"))]
        assert len(measured) > 20
        for key in measured:
            assert log[key] == pytest.approx(of_one[key], rel=2e-3, abs=1e-4), key


@pytest.mark.engines
@pytest.mark.parametrize("engine", ENGINES)
def test_saved_and_resumed(engine, runs):
    """From step 2 on the run is the same, to the bit: parameters, the normalisation's state, what is logged."""
    for kind in ("FULL", "SHARDED") if engine == "fsdp2" else ("",):
        folder = runs(engine) / f"saved{kind}"
        whole, resumed = (torch.load(folder / f"{name}.0.pt") for name in ("result", "resumed"))
        assert distance(resumed["parameters"], whole["parameters"]) == 0
        last = [run["logs"][-2] for run in (whole, resumed)]
        for key in ("loss", "grad_norm", "normalization/scale_mean"):
            assert last[0][key] == last[1][key], key
        there = {path.name for path in (folder / "checkpoint-2").iterdir()}
        if engine == "fsdp2":
            assert ("pytorch_model_fsdp_0" in there) == (kind == "SHARDED"), there


@pytest.mark.engines
@pytest.mark.parametrize("engine", ENGINES)
def test_the_script(engine, warm_policy, tmp_path):
    """``examples/math.py`` by ``accelerate launch`` with our configuration trains, says what it does, saves a model."""
    script = ["examples/math.py"] if engine != "fsdp2" else ["tests/fsdp2_on_cpu.py", "examples/math.py"]
    options = (
        f"--model_name_or_path {warm_policy} --output_dir {tmp_path / 'run'} --dataset arithmetic --max_steps 2 "
        "--eval_size 16 --eval_strategy steps --max_completion_length 8 --interference_every 1 --logging_steps 1 "
        "--learning_rate 1e-3 --per_device_train_batch_size 16 --num_generations 8 --use_cpu true"
    )
    output = launch(engine, *script, *options.split())
    assert "on 2 processes" in output and "Held-out accuracy" in output
    assert "Interference doesn't record" not in output and "FSDP is requested" not in output
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [log["interference/coverage"] for log in history if "interference/coverage" in log]
    saved = load_file(tmp_path / "run" / "model.safetensors")
    before = load_file(warm_policy / "model.safetensors")
    assert {name: saved[name].shape for name in before} == {name: value.shape for name, value in before.items()}
    assert all(torch.isfinite(value).all() for value in saved.values())


@pytest.mark.engines
@pytest.mark.parametrize("engine", [ENGINES[2], ENGINES[1]])
def test_one_case(engine, policies, tmp_path):
    """Half of the groups dead, prompts shared, two iterations: one process's run. The short one, for every commit."""
    case, results = CASES["shared"], {}
    for where in (engine, "one"):
        spec = specification(policies, tmp_path / where, where, "shared", "ours", **case)
        train(where, tmp_path, [spec])
        results[where] = torch.load(tmp_path / where / "result.0.pt")["parameters"]
    assert distance(results[engine], results["one"]) < 1e-6


@pytest.mark.engines
def test_asked_for_and_not_run(policies, tmp_path):
    """FSDP on CPUs is DDP in accelerate: said, once."""
    spec = specification(policies, tmp_path / "run", "ddp", "full", "ours", options={"max_steps": 1})
    output = train("fsdp2", tmp_path, [spec])
    assert output.count("FSDP is requested, but MULTI_CPU runs") == 1, output[-3000:]
