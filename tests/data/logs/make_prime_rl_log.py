"""Makes ``prime_rl.jsonl`` with prime-rl's own code: PRIME_RL=CHECKOUT python tests/data/logs/make_logs.py prime_rl

CHECKOUT is prime-rl at commit 559b44772; needs verifiers 0.4.0. Episodes of verifiers go through prime-rl's GRPO, its
train sink (which drops answers without an advantage), its metrics and its ``FileMonitor``.
What isn't prime-rl's:

* Rewards, lengths, errors and times are made up; so are the trainer's numbers, as its step needs a GPU. Their names are
  those that src/prime_rl/trainer/rl/train.py:651-688 logs. Disk usage is left out.
* The loop around the sink, and the orchestrator's own names, are a copy of orchestrator.py:697-743 and 931-938.
* To keep the file small ``LEFT_OUT`` is missing in the first step, and all but ``SHORT`` in the others.
* Two modules are stubs: the monitors of W&B and of Prime's platform, whose packages aren't needed here. verifiers 0.4.0
  has no ``Branch.multi_modal_data``, which the sink reads: it is None, as of a text.
"""

import asyncio
import os
import random
import re
import sys
from pathlib import Path
from statistics import mean, median, stdev
from types import ModuleType, SimpleNamespace
from typing import Any

CHECKOUT = Path(os.environ.get("PRIME_RL", "prime-rl"))
STEPS, GOOD = 18, 9  # of the run, and until hardly an answer is right
GROUP, BATCH, LONGEST = 8, 256, 256  # answers to a prompt, answers a batch, tokens of an answer
ENVIRONMENTS = ("gsm8k", "math")
NAMES = "reward/mean|num_output_tokens/m.+|is_truncated/mean|stop_condition/.+|solved_.+|has_error/mean|(avg|pass)@.+"
LEFT_OUT = re.compile(r".+/(p10|p90)|.+/timing/.+")
SHORT = re.compile(rf"(train/agg|eval/.+)/(all|effective)/agent/({NAMES})|(time|progress|off_policy)/.+|step")


def load() -> SimpleNamespace:
    """prime-rl's classes."""
    sys.path[:0] = [str(CHECKOUT / "src"), str(CHECKOUT / "packages" / "prime-rl-configs" / "src")]
    for name, of in (("prime", "PrimeMonitor"), ("wandb", "WandbMonitor")):
        stub = ModuleType(f"prime_rl.monitors.{name}")
        setattr(stub, of, object)
        sys.modules[stub.__name__] = stub
    import verifiers.v1 as vf
    from prime_rl.configs.algorithm import GRPOAlgoConfig
    from prime_rl.configs.monitors import FileMonitorConfig
    from prime_rl.monitors import file
    from prime_rl.orchestrator.algo.grpo import GRPOAlgorithm
    from prime_rl.orchestrator.metrics import EvalEpisodes
    from prime_rl.orchestrator.train_sink import TrainSink
    from prime_rl.orchestrator.types import Progress

    vf.Branch.multi_modal_data = None
    file.time = SimpleNamespace(time=iter(range(1_790_000_000, 1_800_000_000)).__next__)
    algorithm = GRPOAlgorithm(GRPOAlgoConfig(), None)
    environment = SimpleNamespace(
        config=SimpleNamespace(group_size=GROUP), algorithm=algorithm, sampling_args={"temperature": 1.0}
    )
    config = SimpleNamespace(max_off_policy_steps=8, train=SimpleNamespace(filter_zero_advantages=True))  # the defaults
    progress = Progress()
    sink = TrainSink(
        config,
        tokenizer=None,
        train_envs=SimpleNamespace(get=lambda name: environment),
        mm_token_type_ids_mapping=None,
        progress=progress,
        batch_size=BATCH,
        token_batch_size=None,
    )
    return SimpleNamespace(
        sink=sink, progress=progress, monitor=file.FileMonitor(FileMonitorConfig()), EvalEpisodes=EvalEpisodes
    )


def episode(draw: random.Random, environment: str, group: str, right: float, work: Any) -> Any:
    """An episode with one answer, which is right with this probability."""
    import verifiers.v1 as vf
    from verifiers.v1.episode import EnvInfo, GroupInfo
    from verifiers.v1.trace import AgentSpan, Error, TimeSplit, Timing

    task = vf.TraceTask(type="Task", data=vf.TaskData(idx=0, prompt="a question"))
    tokens, failed = min(LONGEST, round(draw.gauss(150, 50))), draw.random() < 0.02
    tokens = max(8, tokens)
    prompt = vf.MessageNode(message=vf.UserMessage(content="a question"), token_ids=[1] * 20, mask=[False] * 20)
    answer = vf.MessageNode(parent=0, message=vf.AssistantMessage(content="an answer"), sampled=True)
    answer.token_ids, answer.mask, answer.logprobs = [2] * tokens, [True] * tokens, [-0.5] * tokens
    usage = vf.Usage(prompt_tokens=20, completion_tokens=tokens)
    call = vf.ModelCall(node=1, finish_reason="length" if tokens == LONGEST else "stop", usage=usage)
    trace = vf.Trace(
        task=task,
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=[prompt, answer],
        calls=[call],
        timing=Timing(start=0.0, agent=AgentSpan(start=1.0, end=3.5, model=TimeSplit(duration=2.0))),
        ok=not failed,
        is_completed=True,
        stop_condition="sandbox_error" if failed else "agent_completed",
        errors=[Error(type="SandboxError", message="")] if failed else [],
    )
    if not failed:
        trace.record_reward("correct", float(draw.random() < right))
    run = vf.TrainRunInfo(id="run", work=work)
    return vf.Episode(
        env=EnvInfo(id=environment, name=environment),
        task=task,
        group=GroupInfo(id=group),
        run=run,
        ok=not failed,
        traces=[trace],
    )


def rate(step: int) -> float:
    return max(0.002, 0.5 - step / GOOD / 2)


async def train_batch(of: SimpleNamespace, draw: random.Random) -> Any:
    """The next batch with a gradient."""
    import verifiers.v1 as vf

    step, number = of.progress.step, 0
    while True:
        environment, number = draw.choices(ENVIRONMENTS, (3, 1))[0], number + 1
        for _ in range(GROUP):
            work = vf.TrainWorkInfo(step=step, policy={"start": step - 1, "end": step - 1})
            batch = await of.sink.add(episode(draw, environment, f"{step}-{number}", rate(step), work))
            if batch is not None and batch.samples:
                return batch


def of_train(batch: Any, step: int) -> dict[str, float]:
    """The orchestrator's metrics of a step: orchestrator.py:697-743."""
    from prime_rl.orchestrator.utils import episode_staleness

    effective, metrics = batch.cohort.effective, {}
    for subset, pool in (("all", batch.episodes), ("effective", effective)):
        metrics |= pool.metrics.to_wandb(prefix="train/agg", subset=subset)
        for name, of_one in pool.by_env().items():
            metrics |= of_one.metrics.to_wandb(prefix=f"train/{name}", subset=subset)
    metrics |= {"progress/tokens": batch.episodes.num_total_tokens, "progress/rollouts": batch.episodes.num_traces}
    metrics |= {"time/step": 20.0, "time/pack": 0.5, "time/save_ckpt": 0, "time/wait_for_policy": 0.0, "step": step}
    staleness = [episode_staleness(one, step)[0] for one in effective]
    return metrics | {"off_policy/mean": sum(staleness) / len(staleness), "off_policy/max": float(max(staleness))}


def of_eval(of: SimpleNamespace, draw: random.Random, step: int) -> dict[str, float]:
    """The metrics of an evaluation: orchestrator.py:931-938."""
    import verifiers.v1 as vf

    work = vf.EvalWorkInfo(step=step, policy={"start": step, "end": step})
    found = [episode(draw, "gsm8k", f"eval-{i // 4}", rate(step), work) for i in range(64)]
    episodes, metrics = of.EvalEpisodes(found, 4), {}
    for subset, pool in (("all", episodes), ("effective", episodes.effective)):
        metrics |= pool.metrics.to_wandb(prefix="eval/gsm8k", subset=subset)
    return metrics | {"eval/gsm8k/policy_version": float(step), "step": float(step)}


def of_trainer(draw: random.Random, step: int) -> list[dict[str, float]]:
    """The trainer's lines of a step: train.py:651-688, after ``filter_rl_trainer_tensor_stats_for_wandb``."""
    drawn = {"loss": 0.01, "entropy/all": 0.4, "entropy/gsm8k": 0.4, "mismatch_kl/all": 0.001, "is_masked": 0.002}
    stats = {}
    for name, size in drawn.items():
        values = [size * draw.uniform(0.5, 1.5) for _ in range(8)]
        stats |= {f"{name}/mean": mean(values), f"{name}/max": max(values)}
        if name == "loss":
            stats |= {f"{name}/median": median(values), f"{name}/std": stdev(values), f"{name}/min": min(values)}
    stats["kl_ent_ratio/mean"] = stats["mismatch_kl/all/mean"] / stats["entropy/all/mean"]
    perf = {"perf/throughput": 9000.0, "perf/throughput_per_gpu": 9000.0, "perf/mfu": 30.0, "perf/peak_memory": 40.0}
    optim = {"optim/lr": 1e-6, "step": step, "optim/grad_norm": round(draw.uniform(0.04, 0.06), 6)}
    time = {"time/step": 18.0, "time/wait_for_batch": 3.0, "time/load_data": 0.1, "time/broadcast_weights": 1.0}
    time |= {"time/save_ckpt": 0, "time/forward_backward": 13.0}
    return [{**perf, "step": step}, optim, {**stats, "step": step}, {**time, "step": step}]


def short(metrics: dict[str, float], first: bool) -> dict[str, float]:
    return {
        name: value
        for name, value in metrics.items()
        if not LEFT_OUT.fullmatch(name) and (first or SHORT.fullmatch(name))
    }


async def run(folder: Path) -> None:
    of, draw = load(), random.Random(0)
    await of.monitor.init(output_dir=folder)
    evaluated: dict[int, dict[str, float]] = {}  # when an evaluation ends -> its metrics
    for step in range(1, STEPS + 1):
        batch = await train_batch(of, draw)
        of.progress.step += 1
        await of.monitor.log_metrics(short(of_train(batch, step), step == 1), step=step)
        for metrics in of_trainer(draw, step):
            await of.monitor.log_metrics(metrics, step=step)
        if step % 6 == 2:
            evaluated[step + 2] = of_eval(of, draw, step)
        if step in evaluated:
            await of.monitor.log_metrics(short(evaluated[step], False), step=step - 2)
    of.monitor.file.close()


def write(file: Path, folder: Path) -> None:
    asyncio.run(run(folder))
    (folder / "metrics.jsonl").replace(file)
