"""Makes the logs in this folder with the libraries that write them: python tests/data/logs/make_logs.py [trl verl ...]

* ``trl``: one run of TRL's own trainer, whose rewards end after half of it, logged by transformers' callbacks for
  TensorBoard, W&B (offline) and trackio. Host and user are replaced. ``wandb_history.json`` and ``.csv`` are the rows
  that W&B's own reader (``wandb leet inspect``) finds in ``run.wandb``; the CSV is pandas' of them, as in
  ``run.history()``. An export from W&B's server may differ. Needs trl, tensorboard, wandb (0.31) and trackio.
* ``verl``: ``actor/*`` and ``val-core/*`` are made up, as they need a GPU worker. Needs verl (0.9.1, with ray).
* ``prime_rl``: see ``make_prime_rl_log.py``.
* ``csv``: nobody's.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

HERE = Path(__file__).parent
STEPS, GOOD = 18, 9  # of the run, and until its rewards end
WORK = Path(tempfile.mkdtemp())
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "TRACKIO_DIR": str(WORK / "trackio"),
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_DIR": str(WORK),
    "WANDB_CONSOLE": "off",
    "WANDB_HOST": "host",
    "WANDB_USERNAME": "user",
    "WANDB_X_DISABLE_META": "true",
    "WANDB_X_DISABLE_STATS": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
}.items():
    os.environ[name] = value


def trl_run(folder: Path = WORK) -> None:
    """TRL's own trainer, with the three callbacks. The reward is the share of digits; it is 0 after ``GOOD`` steps."""
    from harness import OPTIONS, digits, prompts, save_policy
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, trainer_state, **kwargs):
        return [value * (trainer_state.global_step < GOOD) for value in digits(completions)]

    save_policy(folder / "models" / "policy")
    reports = ["tensorboard", "wandb", "trackio"]
    options = {**OPTIONS, "max_steps": STEPS, "report_to": reports, "eval_strategy": "steps", "eval_steps": 6}
    options |= {"project": "project", "run_name": "run", "num_generations_eval": 4, "output_dir": "output"}
    options["per_device_train_batch_size"] = 32  # 8 groups a step, for a verdict on their share
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    os.chdir(folder)
    trainer = GRPOTrainer(
        "models/policy", reward, args=GRPOConfig(**options), train_dataset=prompts(64), eval_dataset=prompts(8)
    )
    trainer.train()
    trainer.save_state()
    copy_of_trl(folder)
    wandb_files()


def copy_of_trl(folder: Path) -> None:
    state = json.loads((folder / "output" / "trainer_state.json").read_text())
    (HERE / "trl").mkdir(exist_ok=True)
    (HERE / "trl" / "trainer_state.json").write_text(json.dumps(state))
    (HERE / "tensorboard").mkdir(exist_ok=True)
    (events,) = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_size)[-1:]
    shutil.copy(events, HERE / "tensorboard" / "events.out.tfevents.1790000000.host.1.0")
    (database,) = (WORK / "trackio").glob("*.db")
    with closing(sqlite3.connect(database, isolation_level=None)) as opened:
        opened.execute("PRAGMA journal_mode=DELETE")
        opened.execute("UPDATE configs SET config = json_set(config, '$._Username', 'user')")
        opened.execute("DELETE FROM system_metrics")
        opened.execute("PRAGMA page_size=512")  # many small tables
        opened.execute("VACUUM")
    shutil.copy(database, HERE / "trackio.db")


def wandb_files() -> None:
    """The run's file, and its rows as W&B's own reader returns them."""
    import pandas
    import wandb

    wandb.finish()
    (file,) = WORK.glob("wandb/offline-run-*/run-*.wandb")
    shutil.copy(file, HERE / "run.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not printed.stderr, "a record that W&B can't read"
    records = [json.loads(line) for line in printed.stdout.splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    (HERE / "wandb_history.json").write_text(json.dumps(rows))
    pandas.DataFrame.from_records(rows).to_csv(HERE / "wandb_history.csv", index=False)


def verl_log() -> None:
    """verl's file logger; the batch's metrics by verl, of answers that come to the limit as the entropy falls."""
    import torch
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.ppo.metric_utils import compute_data_metrics
    from verl.utils.tracking import FileLogger

    os.environ["VERL_FILE_LOGGER_PATH"] = str(HERE / "verl.jsonl")
    logger, generator = FileLogger("project", "run"), torch.Generator().manual_seed(0)
    accuracy = "val-core/openai/gsm8k/acc/mean@1"
    logger.log({accuracy: 0.25}, 0)
    for step in range(1, STEPS + 1):
        longest, share = 16, min(1.0, step / GOOD)
        length_B = torch.where(torch.rand(32, generator=generator) < share, longest, 6)
        mask_BT = (torch.arange(longest)[None] < length_B[:, None]).long()
        right_B = (torch.rand(32, generator=generator) < 0.5 - 0.3 * share).float()
        score_BT = torch.zeros(32, longest).scatter(1, length_B[:, None] - 1, right_B[:, None])
        advantage_BT = (right_B - right_B.mean())[:, None] * mask_BT
        tensors = {"prompts": torch.zeros(32, 4), "responses": mask_BT, "response_mask": mask_BT}
        tensors |= {"token_level_scores": score_BT}
        tensors |= {"token_level_rewards": score_BT, "advantages": advantage_BT, "returns": advantage_BT}
        tensors |= {"attention_mask": torch.cat([torch.ones(32, 4).long(), mask_BT], 1)}
        metrics = compute_data_metrics(DataProto(batch=TensorDict(tensors, batch_size=32)), use_critic=False)
        metrics |= {"actor/entropy": 1.2 * (1 - share) + 0.004, "actor/grad_norm": 0.3 + 0.1 * right_B.mean().item()}
        metrics |= {"actor/pg_clipfrac": 0.01, "actor/ppo_kl": 0.001, "actor/kl_loss": 0.02, "actor/lr": 1e-6}
        metrics |= {"training/global_step": step, "training/epoch": 0, "perf/time_per_step": 30.0}
        if step == 3:
            metrics["actor/grad_norm"] = float("nan")
        if step % 6 == 0:
            metrics[accuracy] = 0.25 - 0.2 * share
        logger.log(metrics, step)
    logger.finish()


def prime_rl_log() -> None:
    from make_prime_rl_log import write

    write(HERE / "prime_rl.jsonl", WORK)


def plain_csv() -> None:
    rows = ["step;reward;entropy;grad_norm"]
    rows += [f"{10 * i};{0.5 - i / 100:.2f};{1 + i / 8:.3f};{0.1 + i % 3 / 10:.1f}" for i in range(1, STEPS + 1)]
    (HERE / "plain.csv").write_text("\n".join(rows) + "\n")


MAKERS = {"trl": trl_run, "verl": verl_log, "prime_rl": prime_rl_log, "csv": plain_csv}

if __name__ == "__main__":
    for name in sys.argv[1:] or MAKERS:
        MAKERS[name]()
    shutil.rmtree(WORK)
