"""A dataset's column ``task``: rewards, interference, what-if and the report by task; by hand, and in real runs."""

import json
from collections import defaultdict

import pytest
import torch
from harness import build, by_length, logged, prompts, train, two_tasks
from kernel_inputs import step_of

from grpo_kernels import Normalized
from grpo_kernels.interference.step_gradients import group_by_prompt
from grpo_kernels.interference.task_sums import task_gradients
from trl_ext import read_interference
from trl_ext.advantages.by_task import TaskMeans, TaskNames, task_sums
from trl_ext.advantages.prompt_keys import NO_TASK, task_key
from trl_ext.advantages.rewarded import RewardedBatch
from trl_ext.report.by_task import tasks as tasks_of_report
from trl_ext.report.command import main as report_command
from trl_ext.report.read_run import read_run
from trl_ext.report.what_if_command import main as what_if_command


def test_gradients_of_tasks_by_hand():
    """Two tasks of two prompts, one prompt of none: sums (2, 0) and (0, 2) + (-1, 0), and one along the first."""
    vectors = [[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 0.0]]
    groups = group_by_prompt(step_of(vectors, range(5), [1.0] * 5))
    found = task_gradients(groups, torch.tensor([0, 0, 1, 1, -1]), 2)
    assert found.cosine_TT[0, 1] == pytest.approx(-2 / (2 * 5**0.5)) == found.cosine_TT[1, 0]
    # the whole gradient is (4, 2), of squared length 20
    assert found.share_T.tolist() == pytest.approx([2 * 4 / 20, (-1 * 4 + 2 * 2) / 20])
    # without one of the first task nothing changes; without one of the second the cosine is 0, or -1
    without = torch.tensor([-1.0, 0.0])
    assert found.error_TT[0, 1] == pytest.approx(float(((without - without.mean()).square().sum() / 2).sqrt()))


def test_errors_of_cosines_are_those_of_samples():
    """Standard errors against the spread of cosines over draws of prompts."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    cosines, errors = [], []
    for _ in range(200):
        vectors = torch.cat([0.5 * common[task] + torch.randn(12, 20, generator=generator) for task in range(2)])
        groups = group_by_prompt(step_of(vectors, range(24), [1.0] * 24))
        found = task_gradients(groups, torch.arange(24) // 12, 2)
        cosines.append(found.cosine_TT[0, 1])
        errors.append(found.error_TT[0, 1])
    spread, told = torch.stack(cosines).std(), torch.stack(errors).square().mean().sqrt()
    assert 0.8 < told / spread < 1.4  # a jackknife is a little wide


def test_a_task_without_a_gradient():
    groups = group_by_prompt(step_of([[1.0], [0.0], [-1.0]], range(3), [1.0] * 3, [1.0, 0.0, 1.0]))
    found = task_gradients(groups, torch.tensor([0, 1, 2]), 3, sketch_rmse=0.1)
    assert found.cosine_TT[0, 1].isnan() and found.cosine_TT[0, 2] == -1
    assert found.error_TT[0, 2].isnan()  # single prompts
    assert found.share_T.isnan().all()  # the step's gradient is 0


def no_advantages(P):
    return Normalized(torch.zeros(P, 2), torch.ones(P, 1), torch.ones(P, 1))


def rewarded(rewards_PG, names):
    keys = torch.arange(len(rewards_PG)).repeat_interleave(rewards_PG.shape[1])
    task = torch.tensor([NO_TASK if name is None else task_key(name) for name in names])
    task_B = task.repeat_interleave(rewards_PG.shape[1])
    one = torch.ones(1)
    return RewardedBatch(rewards_PG.reshape(-1, 1), one, torch.ones_like(keys), keys, task_B, rewards_PG.shape[1])


def test_rewards_by_task_by_hand():
    nan = float("nan")
    batch = rewarded(torch.tensor([[1.0, 0.0], [1.0, 1.0], [nan, 0.5], [nan, nan]]), ["a", "a", "b", None])
    names = TaskNames(1, pytest.fail)
    names.learn(batch.task_keys_B, {0: "a", 1: "a", 2: "b"})
    assert names.of_prompts(batch) == {0: "a", 1: "a", 2: "b"}
    advantages = torch.tensor([[0.5, -0.5], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    found = task_sums(batch, Normalized(advantages, torch.ones(4, 1), torch.ones(4, 1)), names.names)
    assert found == {
        "tasks/a/reward": (3.0, 4),
        "tasks/a/live_share": (1.0, 2),
        "tasks/a/advantage_abs_mean": (1.0, 4),
        "tasks/a/batch_share": (2.0, 4),
        "tasks/b/reward": (0.5, 1),
        "tasks/b/live_share": (0.0, 1),
        "tasks/b/advantage_abs_mean": (0.0, 2),
        "tasks/b/batch_share": (1.0, 4),
    }


def test_means_are_over_prompts_and_not_over_batches():
    """One prompt of a task in a batch and three in the next, none in the third; after a log they begin anew."""
    names = TaskNames(1, pytest.fail)
    logged, means = defaultdict(list), TaskMeans()
    for rewards, tasks in (([[1.0, 1.0], [0.0, 0.0]], "ab"), ([[0.0, 0.0]] * 3, "aaa"), ([[1.0, 0.0]], "b")):
        batch = rewarded(torch.tensor(rewards), tasks)
        names.learn(batch.task_keys_B, dict(enumerate(tasks)))
        means.into(logged, task_sums(batch, no_advantages(len(rewards)), names.names))
    assert logged["tasks/a/reward"] == [0.25] and logged["tasks/b/reward"] == [0.25]
    assert logged["tasks/a/batch_share"] == [4 / 6] and logged["tasks/b/live_share"] == [0.5]
    logged.clear()  # as TRL does when it has logged
    means.into(logged, {"tasks/a/reward": (3.0, 4)})
    assert dict(logged) == {"tasks/a/reward": [0.75]}
    for answers, live, expected in ((16, 0, 16.0), (16, 4, 8.0), (80, 4, 14.0)):  # the sum while no group is live
        means.into(logged, {"compute/answers_per_live_group": (answers, live)})
        assert logged["compute/answers_per_live_group"] == [expected]


def test_too_many_names_are_said():
    said = []
    names = TaskNames(1, said.append)
    batch = rewarded(torch.rand(20, 2), [f"row {i}" for i in range(20)])
    names.learn(batch.task_keys_B, {i: f"row {i}" for i in range(20)})
    assert len(said) == 1 and "more than 16 names" in said[0]
    assert task_sums(batch, no_advantages(20), names.names) == {}


OPTIONS = {"interference_every": 1, "per_device_train_batch_size": 32, "max_steps": 4}


@pytest.fixture(scope="module")
def run_of_tasks(tiny_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train(tiny_policy, folder, by_length, two_tasks(), **OPTIONS), folder


def test_held_out_rewards_by_task_are_of_all_its_prompts(tiny_policy, tmp_path):
    """Evaluated in batches that hold different numbers of a task: its mean is over its answers, as counted by hand."""
    seen = defaultdict(list)

    def remember(completion_ids, task, **kwargs):
        rewards = by_length(completion_ids)
        for name, reward in zip(task, rewards, strict=True):
            seen[name].append(reward)
        return rewards

    held_out = prompts(12).add_column("task", ["up"] * 3 + ["down"] * 9)
    trainer = build(tiny_policy, tmp_path, remember, two_tasks(), eval_dataset=held_out, num_generations_eval=2)
    logs = trainer.evaluate()
    assert len(seen["up"]) == 6 and len(seen["down"]) == 18
    for name, rewards in seen.items():
        assert logs[f"eval_tasks/{name}/reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
        assert logs[f"eval_tasks/{name}/batch_share"] == pytest.approx(len(rewards) / 24)


def test_what_a_run_logs_of_its_tasks(run_of_tasks):
    trainer, folder = run_of_tasks
    for log, record in zip(logged(trainer), read_interference(folder), strict=True):
        shares = [log[f"tasks/{name}/batch_share"] for name in ("up", "down")]
        assert sum(shares) == 1
        mixed = sum(log[f"tasks/{name}/reward"] * s for name, s in zip(("up", "down"), shares, strict=True))
        assert mixed == pytest.approx(log["reward"], abs=1e-5)
        assert log["tasks/up/heard"] + log["tasks/down/heard"] == pytest.approx(1)
        assert -1 <= log["tasks/down/cos/up"] <= 1 and log["tasks/down/cos_error/up"] > 0
        assert "tasks/up/cos/down" not in log  # each pair once
        for row in record.what_if["rows"].values():
            assert set(row["tasks"]) == {"up", "down"}
            assert row["tasks"]["up"]["share"] + row["tasks"]["down"]["share"] == pytest.approx(1, abs=1e-4)


def test_the_commands_and_the_report(run_of_tasks, tmp_path):
    _, folder = run_of_tasks
    what_if_command([str(folder), "--json", str(tmp_path / "table.json")])
    table = json.loads((tmp_path / "table.json").read_text())
    assert set(table["methods"]["mean"]["tasks"]) == {"up", "down"}
    run = read_run(folder)
    found = tasks_of_report(run)
    assert found.names == ["down", "up"] and found.cosines[0][1] == found.cosines[1][0]
    rewards = {name: run.curve(f"tasks/{name}/reward").values[-1] for name in ("up", "down")}
    assert any(f"weakest task is {min(rewards, key=rewards.get)}" in told for told in found.told)
    report_command(["report", str(folder), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    for text in ("Reward by task", "Who is heard", "The weakest task", "Task against task"):
        assert text in page


def test_no_column_nothing_of_tasks(tiny_policy, tmp_path):
    trainer = train(tiny_policy, tmp_path, by_length, **OPTIONS)
    assert not any(name.startswith("tasks/") for log in trainer.state.log_history for name in log)
    assert tasks_of_report(read_run(tmp_path)) is None
