"""Makes the logs in this folder with the libraries that write them: python tests/data/logs/make_logs.py

Needs trl, tensorboard, wandb, trackio and verl (0.9.1, with ray; of it the file logger and the batch metrics). One run
of TRL's own trainer, whose rewards end after half of it, is logged by transformers' callbacks for TensorBoard, W&B
(offline) and trackio. Host, user and paths are replaced. What isn't made by its writer:

* ``wandb_history.json`` and ``.csv``: the rows of ``run.wandb``, as ``run.scan_history()`` and ``run.history()`` return
  them. The export itself needs W&B's server.
* ``verl.jsonl``: ``actor/*`` and ``val-core/*`` are made up, as they need a GPU worker.
* ``prime_rl.jsonl``: prime-rl is in no package index. Its ``FileMonitor`` (src/prime_rl/monitors/file.py:40) writes
  json.dumps({"step": step, "time": time.time(), **metrics}).
"""

import getpass
import json
import os
import shutil
import socket
import sqlite3
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


def trl_run(folder: Path) -> None:
    """TRL's own trainer, with the three callbacks. The reward is the share of digits; it is 0 after ``GOOD`` steps."""
    from harness import OPTIONS, digits, prompts, save_policy
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, trainer_state, **kwargs):
        return [value * (trainer_state.global_step < GOOD) for value in digits(completions)]

    policy = save_policy(folder / "policy")
    reports = ["tensorboard", "wandb", "trackio"]
    options = {**OPTIONS, "max_steps": STEPS, "report_to": reports, "eval_strategy": "steps", "eval_steps": 6}
    options |= {"project": "project", "run_name": "run", "num_generations_eval": 4, "output_dir": "output"}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    os.chdir(folder)
    trainer = GRPOTrainer(
        str(policy), reward, args=GRPOConfig(**options), train_dataset=prompts(64), eval_dataset=prompts(8)
    )
    trainer.train()
    trainer.save_state()


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
        opened.execute("UPDATE configs SET config = '{}'")
        opened.execute("DELETE FROM system_metrics")
        opened.execute("PRAGMA page_size=512")  # many small tables
        opened.execute("VACUUM")
    shutil.copy(database, HERE / "trackio.db")


def wandb_files() -> None:
    """The run's file, and its rows as W&B's API returns them."""
    import pandas
    import wandb

    from trl_ext.report.foreign.wandb import read

    wandb.finish()
    (file,) = WORK.glob("wandb/offline-run-*/run-*.wandb")
    masked = file.read_bytes()
    for word in (str(WORK), socket.gethostname(), getpass.getuser()):
        masked = masked.replace(word.encode(), b"x" * len(word.encode()))
    (HERE / "run.wandb").write_bytes(masked)
    rows = read(file).rows
    (HERE / "wandb_history.json").write_text(json.dumps(rows))
    pandas.DataFrame(rows).to_csv(HERE / "wandb_history.csv", index=False)


def verl_log(folder: Path) -> None:
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
    """What the orchestrator (one line a step) and the trainer (five lines a step) append to one file."""
    lines = []
    for step in range(1, STEPS + 1):
        right = max(0.0, 0.5 - step / GOOD / 2)
        agent = "train/agg/effective/agent"
        rollouts = {f"{agent}/reward/mean": right, f"{agent}/num_output_tokens/mean": 400.0 + 5 * step}
        rollouts |= {f"{agent}/num_output_tokens/max": 1024.0, f"{agent}/num_output_tokens/min": 60.0}
        rollouts |= {f"{agent}/is_truncated/mean": 0.1, f"{agent}/stop_condition/generation_truncated": 0.08}
        rollouts |= {
            "train/agg/all/agent/solved_none": 1.0 if step > GOOD else 0.3,
            "train/agg/all/agent/solved_all": 0.0,
        }
        lines.append({"step": step, **rollouts, "time/step": 20.0, "progress/tokens": 51200})
        lines.append({"step": step, "perf/throughput": 9000.0, "perf/mfu": 30.0})
        lines.append({"step": step, "optim/lr": 1e-6, "optim/grad_norm": 0.05})
        stats = {"entropy/all/mean": 0.4, "mismatch_kl/all/mean": 0.001, "loss/mean": 0.01, "is_masked/mean": 0.002}
        lines.append({"step": step, **stats})
        lines.append({"step": step, "time/step": 18.0, "time/wait_for_batch": 3.0})
        if step % 6 == 4:  # an evaluation ends two steps after it began
            lines.append({"step": step - 2, "eval/gsm8k/effective/agent/avg@4": right})
    dated = ({"step": line.pop("step"), "time": 1.79e9 + i, **line} for i, line in enumerate(lines))
    (HERE / "prime_rl.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dated))


def plain_csv() -> None:
    rows = ["step;reward;entropy;grad_norm"]
    rows += [f"{10 * i};{0.5 - i / 100:.2f};{1 + i / 8:.3f};{0.1 + i % 3 / 10:.1f}" for i in range(1, STEPS + 1)]
    (HERE / "plain.csv").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    trl_run(WORK)
    copy_of_trl(WORK)
    wandb_files()
    verl_log(WORK)
    prime_rl_log()
    plain_csv()
    shutil.rmtree(WORK)
