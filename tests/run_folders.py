"""Folders of runs, made up and copied, and the pages made of them."""

import json
import shutil
from pathlib import Path

import torch

from grpo_kernels.interference.step_gradients import StepGradients
from trl_ext.report.command import main
from trl_ext.report.run_files import CONFIG_FILE, LOG_FILE


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def log_of(folder: Path, entries, **config) -> Path:
    """A run's folder with this log and configuration alone; an entry that is a text is a line as it stands."""
    folder.mkdir()
    if config:
        (folder / CONFIG_FILE).write_text(json.dumps(config))
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / LOG_FILE).write_text("\n".join(lines))
    return folder


def change_config(folder: Path, **change) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **change}))


def page_of(*arguments, folder: Path) -> str:
    """Makes the report with these arguments, and returns the page."""
    main(["report", *map(str, arguments), "-o", str(folder / "page.html")])
    return (folder / "page.html").read_text()


def gradients(prompts, answers, seed=0, dim=12):
    """A step of random contributions; the prompts' gradients of the two halves point apart."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(prompts * answers, dim, generator=generator, dtype=torch.float64)
    prompt_B = torch.arange(prompts).repeat_interleave(answers)
    u[:, 0] += torch.where(prompt_B < prompts // 2, 3.0, -3.0)
    reward = torch.randint(0, 2, (prompts * answers,), generator=generator).double()
    return StepGradients(u @ u.T, prompt_B, reward, torch.randn(len(reward), generator=generator), answers)


def metrics(**more):
    return {"interference/sketch_rmse": 0.02, "reward": 0.5, **more}
