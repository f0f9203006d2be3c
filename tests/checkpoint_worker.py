"""A short run of a user's, in a process of its own: resumed from what is there, killed, out of room, with a reward
function that fails. ``main`` of each process; the parameters it ends with go to ``end.<rank>.pt``."""

import os
import random
import signal
from pathlib import Path

import torch
from harness import build
from transformers import Trainer, TrainerState

STEPS = 5
STAGES = ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "save_to_json")


def main(policy, folder, options, behaviour):
    torch.use_deterministic_algorithms(True)
    rank = int(os.environ.get("RANK", "0"))
    fails = behaviour.get("fails") and behaviour["rank"] == rank
    calls = []

    def reward(completion_ids, prompts, **kwargs):
        calls.append(1)
        if fails and len(calls) == 3:
            raise KeyError("boom")
        return [float(sum(ids) % 5) for ids in completion_ids]

    trainer = build(policy, folder, reward, max_steps=STEPS, save_strategy="steps", interference_every=2, **options)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"began.{rank}").touch()
    if "kill_in" in behaviour:
        stage, number, fraction = behaviour["kill_in"]
        kill_while_saving(stage, number, fraction)
    trainer.train(resume_from_checkpoint=behaviour.get("resume", "auto"))
    torch.save([p.detach() for p in trainer.model.parameters()], Path(folder) / f"end.{rank}.pt")


def kill_while_saving(stage, number, fraction):
    """In the ``number``-th call of this stage of a checkpoint, the files it wrote are cut to ``fraction``, and the
    process is killed: what a kill in the middle of writing leaves."""
    owner = TrainerState if stage == "save_to_json" else Trainer
    method, seen = getattr(owner, stage), []

    def torn(self, where, *rest, **kwargs):
        place = Path(where)
        before = set(place.rglob("*")) if place.is_dir() else set()
        result = method(self, where, *rest, **kwargs)
        seen.append(1)
        if len(seen) == number:
            files = [place] if place.is_file() else sorted(set(place.rglob("*")) - before)
            for file in files[-1:]:
                os.truncate(file, int(file.stat().st_size * fraction))
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, stage, torn)


def random_kills(count, seed=0):
    """(optimizer, where): a share of the run's own time, or (stage, call, fraction) of a save."""
    draw = random.Random(seed)
    kills = []
    for i in range(count):
        optimizer = ("sgd", "adamw_torch")[i % 2]
        if i % 4 < 2:
            where = draw.uniform(0.0, 1.0)
        else:
            where = (draw.choice(STAGES), draw.randint(1, STEPS), draw.choice((0.0, draw.random())))
        kills.append((optimizer, where))
    return kills
