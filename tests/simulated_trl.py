"""A TRL 1.17 that doesn't exist yet: the installed one with changes, as a package in a folder of its own.

``python tests/simulated_trl.py POLICY FOLDER`` trains stock TRL and our trainer, and prints how they differ as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

SCORE = "_get_per_token_logps_and_entropies"
ITEMS = 'inputs["num_items_in_batch"]'
# name of a change -> what is replaced in TRL's trainer, and by what
CHANGES = {
    "a renamed helper": [(SCORE, "_score_tokens")],
    "an element more from _generate": [
        (
            "    def _generate(",
            "    def _generate(self, prompts):\n        return *self._old(prompts), None\n\n    def _old(",
        ),
        ("tool_images,\n        ) = self._generate(", "tool_images,\n            _,\n        ) = self._generate("),
    ],
    "a renamed metric": [('"clip_ratio/low_mean"', '"clip_fraction/low_mean"')],
    "tokens counted twice": [
        ('"num_items_in_batch": num_items_in_batch,', '"num_items_in_batch": 2 * num_items_in_batch,'),
        (ITEMS, f"({ITEMS} / 2)"),
    ],
    "rewards with other arguments": [
        ("def _calculate_rewards(self, inputs, ", "def _calculate_rewards(self, rollouts, "),
        (
            "rewards_per_func = torch.zeros(len(prompts)",
            "inputs = rollouts\n        rewards_per_func = torch.zeros(len(prompts)",
        ),
    ],
}


def simulate(folder: Path, *changes: str) -> Path:
    """Writes TRL with these changes into ``folder``, and returns the folder, for the front of PYTHONPATH."""
    import trl

    shutil.copytree(Path(trl.__file__).parent, folder / "trl", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "trl/trainer/grpo_trainer.py"
    source = path.read_text()
    for before, after in [pair for change in changes for pair in CHANGES[change]]:
        assert before in source, f"TRL {metadata.version('trl')} has no {before!r}: the simulation must follow it"
        source = source.replace(before, after)
    path.write_text(source)
    info = folder / "trl-1.17.0.dist-info"
    info.mkdir()
    about = metadata.distribution("trl").read_text("METADATA")
    (info / "METADATA").write_text(about.replace(f"Version: {metadata.version('trl')}", "Version: 1.17.0", 1))
    return folder


def main(policy: str, folder: str) -> None:
    from harness import FOUR, logged, parameters, reward_with_dead, train
    from transformers import AutoModelForCausalLM
    from trl import GRPOTrainer

    from trl_ext import CurvatureGRPOTrainer

    options = {**FOUR, "max_steps": 3, "interference_every": 2, "interference_dim": 8}
    trainers = [
        train(Path(policy), Path(folder) / kind.__name__, reward_with_dead(0.5), trainer_class=kind, **options)
        for kind in (GRPOTrainer, CurvatureGRPOTrainer)
    ]
    (stock, stock_logs), (ours, our_logs) = ((parameters(one.model), logged(one)) for one in trainers)
    largest = max(float((ours[name] - value).abs().max()) for name, value in stock.items())
    before = parameters(AutoModelForCausalLM.from_pretrained(policy))
    moved = max(float((before[name] - value).abs().max()) for name, value in stock.items())
    if trainers[0].accelerator.is_main_process:
        print(json.dumps({"largest": largest, "moved": moved, "stock": stock_logs, "ours": our_logs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
