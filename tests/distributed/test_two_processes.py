"""Two real processes (gloo, DDP): the same as one process on the same batch, and the same as TRL."""

import pytest
import torch
from two_process_worker import assert_same_run, run_processes

KEEP = ["advantages", "prompt_id", "group_position", "group_rewards"]


def steps(result):
    """The log's entries of training steps."""
    return [log for log in result["logs"] if "reward" in log]


def test_the_same_as_one_process(tiny_policy, tmp_path):
    options = {"normalization": "global", "loss_type": "grpo"}  # batch statistics, and groups across processes
    options["skip_zero_advantage"] = False  # every row is looked at
    one = run_processes(1, tiny_policy, tmp_path / "one", keep=KEEP, **options)[0]
    two = run_processes(2, tiny_policy, tmp_path / "two", keep=KEEP, **options)
    # a process's clip and length statistics are gathered, so the logs agree too
    assert_same_run(two[0], one)
    assert all(log.get("grad_norm", 1) > 0 for log in one["logs"])
    for name in one["parameters"]:
        assert torch.equal(two[0]["parameters"][name], two[1]["parameters"][name])
    for ours, theirs in zip(steps(two[0]), steps(one), strict=True):
        assert ours["normalization/zero_variance_frac"] == theirs["normalization/zero_variance_frac"]
    for step, whole in enumerate(one["batches"]):
        parts = [two[rank]["batches"][step] for rank in (0, 1)]
        joined = {name: torch.cat([part[name] for part in parts]) for name in KEEP}
        whole_order = (whole["prompt_id"] * 8 + whole["group_position"]).argsort()  # TRL has shuffled the rows
        order = (joined["prompt_id"] * 8 + joined["group_position"]).argsort()
        for name in KEEP:
            found, expected = joined[name][order], whole[name][whole_order]
            torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-6)
        assert set(parts[0]["prompt_id"].tolist()) & set(parts[1]["prompt_id"].tolist()) == {1}


@pytest.mark.parametrize(("loss_type", "skip"), [("dapo", False), ("bnpo", True)])
def test_the_same_as_trl_on_two_processes(loss_type, skip, tiny_policy, tmp_path):
    options = {"loss_type": loss_type, "gradient_accumulation_steps": 2}
    theirs = run_processes(2, tiny_policy, tmp_path / "trl", trainer="trl", **options)[0]
    ours = run_processes(2, tiny_policy, tmp_path / "ours", skip_zero_advantage=skip, **options)[0]
    assert_same_run(ours, theirs)


COMPILED = {"compile_layers": True, "torch_compile_backend": "aot_eager"}


@pytest.mark.parametrize(("dead", "compiled"), [(0.0, {}), (0.5, {}), (0.5, COMPILED)])
def test_shared_prompts_on_two_processes(dead, compiled, tiny_policy, tmp_path):
    """Of different live counts: both make as many passes, and the parameters are TRL's."""
    options = {"gradient_accumulation_steps": 2, "dead": dead, "num_iterations": 2}
    theirs = run_processes(2, tiny_policy, tmp_path / "trl", trainer="trl", **options)[0]
    own = {"share_prompts": True, "interference_every": 0, **compiled}
    ours = run_processes(2, tiny_policy, tmp_path / "ours", **own, **options)[0]
    assert_same_run(ours, theirs)
    assert all(log["compute/flops_saved_frac"] > 0.2 for log in steps(ours))


def test_both_processes_use_the_size_that_fits_on_both(tiny_policy, tmp_path):
    """Each rehearses by itself, and nothing else changes."""
    options = {"gradient_accumulation_steps": 2, "interference_every": 0}
    plain = run_processes(2, tiny_policy, tmp_path / "plain", **options)
    found = run_processes(2, tiny_policy, tmp_path / "rehearsed", room=(5000, 900), **options)
    assert [one["size"] for one in found] == [900, 900] and [one["size"] for one in plain] == [None, None]
    assert_same_run(found[0], plain[0])
    assert all(log["compute/micro_batches"] == 1 for log in steps(found[0]))


def test_both_processes_leave_out_a_layer_that_is_followed_wrongly(tiny_policy, tmp_path):
    """Found by the first step's own check: it isn't logged, and later ones are as on one process."""
    wrong = {"wrong_layer": "model.layers.0.mlp.down_proj", "interference_every": 1, "learning_rate": 0.0}
    one = run_processes(1, tiny_policy, tmp_path / "one", **wrong)[0]
    two = run_processes(2, tiny_policy, tmp_path / "two", **wrong)[0]
    assert_same_run(two, one)
    logs = steps(two)
    assert ["interference/sketch_check" in log for log in logs] == [False, True, True]
    assert all(0.3 < log["interference/coverage"] < 0.999 for log in logs[1:])


UNLIKE = ("step_time", "runtime", "per_second", "compute/", "interference/sketch_check")


@pytest.mark.parametrize("beta", [0.0, 0.04], ids=["coefficients", "no coefficients"])
def test_a_large_step_is_logged_as_a_small_one(beta, tiny_policy, tmp_path):
    """By columns in place of the matrix, also with KL: two processes, and one."""
    options = {"interference_every": 1, "beta": beta, "learning_rate": 0.05, "interference_parts": True}
    small = run_processes(1, tiny_policy, tmp_path / "small", **options)[0]
    for processes in (1, 2):
        large = run_processes(processes, tiny_policy, tmp_path / f"large{processes}", most_dense=0, **options)
        assert all(one["logs"] and not any("isn't logged" in str(log) for log in one["logs"]) for one in large)
        for ours, theirs in zip(large[0]["logs"], small["logs"], strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                if not any(word in key for word in UNLIKE) and not key.endswith(("_low", "_high")):
                    assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
        logs = steps(large[0])
        assert all(log["interference/sketch_check"] == pytest.approx(1.0, abs=0.2) for log in logs)
        assert ("curvature/fisher_trace_mean" in logs[0]) is (beta == 0)


@pytest.mark.parametrize(
    "place",
    [
        ("trl_ext.recorder.recorder.GradientSketch", "take"),
        ("grpo_kernels.recorder.layer_check.GradientShards", "squared_norms"),
        ("grpo_kernels.recorder.collectives.Collectives", "columns"),
        ("grpo_kernels.recorder.measure", "group_by_prompt"),
        ("grpo_kernels.recorder.measure", "interference_metrics"),
        ("grpo_kernels.recorder.sequence_table.SequenceTable", "pack"),
        ("grpo_kernels.recorder.gradient_recorder", "check_shapes"),
    ],
    ids=lambda place: place[1],
)
def test_out_of_memory_on_one_process_ends_the_logging_of_both(place, tiny_policy, tmp_path):
    """Wherever it happens in the second step; training goes on, as if nothing had been logged."""
    options = {"interference_every": 1, "most_dense": 0, "skip_zero_advantage": False}
    plain = run_processes(2, tiny_policy, tmp_path / "plain", interference_every=0, skip_zero_advantage=False)
    broken = run_processes(2, tiny_policy, tmp_path / "broken", no_memory=(*place, 1), **options)
    for rank in (0, 1):
        for name, value in plain[rank]["parameters"].items():
            assert torch.equal(broken[rank]["parameters"][name], value), name
    logged = ["interference/live_prompts" in log for log in steps(broken[0])]
    assert logged == [True, False, False]


def test_out_of_memory_in_what_if_ends_what_if_alone(tiny_policy, tmp_path):
    options = {
        "interference_every": 1,
        "most_dense": 0,
        "no_memory": ("grpo_kernels.recorder.what_if_log", "gradient_noise", 1),
    }
    broken = run_processes(2, tiny_policy, tmp_path / "run", **options)
    logs = steps(broken[0])
    assert ["what_if/mean/cos" in log for log in logs] == [True, False, False]
    assert all("interference/live_prompts" in log for log in logs)
