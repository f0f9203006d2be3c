"""Sequences without a gradient don't run, the others are regrouped: the same gradient and metrics, for less."""

import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from allpairspy import AllPairs
from harness import (
    PLAIN,
    assert_same,
    assert_same_gradients,
    build,
    digits,
    logged,
    loss_batches,
    messages,
    reward_with_dead,
    tool_rollout,
    train,
    train_both,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny_models import HEADS, save_model
from transformers import GPT2Config, TrainerCallback
from trl import GRPOTrainer
from two_process_worker import assert_same_run, run_processes

from trl_ext import CurvatureGRPOTrainer, read_interference
from trl_ext.batches import micro_batches
from trl_ext.batches.batch_rows import join
from trl_ext.batches.deferred_logprobs import why_complete
from trl_ext.batches.micro_batches import KEY

OPTIONS = {
    "loss_type": ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"],
    "beta": [0.0, 0.05],
    "num_iterations": [1, 2],
    # (gradient accumulation, steps per generation)
    "accumulation": [(4, 4), (2, 4), (4, 2), (1, 1)],
    "lora": [False, True],
    "dead": ["most", "all", "none"],
    "pad_to_multiple_of": [None, 8],
}
DESIGN = [
    dict(zip(OPTIONS, row, strict=True))
    for row in AllPairs(list(OPTIONS.values()), filter_func=lambda row: len(row) < 6 or row[5] != "all" or row[1] == 0)
]


SHARES = {"most": 0.7, "all": 1.0, "none": 0.0}
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
# an optimizer step of 16 sequences in four micro-batches
FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
APART = {**PLAIN, **FOUR}  # and no prompt shared, as with TRL


@pytest.fixture
def passes(monkeypatch):
    """(sequences, columns) of each forward with a gradient through the backbone, the rehearsal's left aside."""
    monkeypatch.setattr("trl_ext.recorder.recorder.rehearse", lambda *args: None)
    seen = []
    forward = torch.nn.Embedding.forward

    def spy(self, ids):
        if torch.is_grad_enabled() and ids.dim() == 2:
            seen.append(tuple(ids.shape))
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", spy)
    return seen


@pytest.mark.parametrize("setting", DESIGN, ids=lambda s: "-".join(str(v).replace(" ", "") for v in s.values()))
def test_same_gradient_for_less(setting, passes, tiny_policy, tmp_path):
    names = ("loss_type", "beta", "num_iterations", "pad_to_multiple_of")
    accumulation, per_generation = setting["accumulation"]
    options = {**APART, **{name: setting[name] for name in names}, "steps_per_generation": per_generation}
    options |= {"gradient_accumulation_steps": accumulation, "peft_config": LORA if setting["lora"] else None}
    reward = reward_with_dead(SHARES[setting["dead"]])
    theirs = train(tiny_policy, tmp_path / "trl", reward, trainer_class=GRPOTrainer, **options)
    full = sum(rows * columns for rows, columns in passes)
    passes.clear()
    ours = train(tiny_policy, tmp_path / "ours", reward, **options)
    assert_same(ours, theirs, small_kl=setting["beta"] > 0)
    run_here = sum(rows * columns for rows, columns in passes)
    alive = [any(g.abs().sum() > 0 for g in step.values()) for step in theirs.recorder.gradients]
    assert any(alive) == (setting["dead"] != "all")
    logs = logged(ours, "compute/tokens_run")
    if setting["loss_type"] == "vespo":
        assert run_here == full and all(log["compute/flops_saved_frac"] == 0 for log in logs)
    elif setting["beta"] == 0 and setting["dead"] != "none":
        assert run_here < 0.8 * full
        assert all(log["compute/sequences_skipped_frac"] > 0 for log in logs if setting["dead"] == "all")
    else:
        assert run_here <= full
    if logs and setting["accumulation"] == (4, 4):  # what is logged is what was run
        saved = sum(log["compute/flops_saved_frac"] for log in logs) / len(logs)
        assert run_here / full == pytest.approx(1 - saved, rel=0.1)


# ---- which case applies, and why


def override(name):
    """A subclass that overrides this method, and changes nothing."""

    def method(self, *arguments, **named):
        return getattr(CurvatureGRPOTrainer, name)(self, *arguments, **named)

    return type("Own", (CurvatureGRPOTrainer,), {name: method})


# options -> micro-batches regrouped, sequences skipped, and why
CASES = {
    "skipped": ({}, True, True, "sequences of advantage 0 don't run"),
    "asked for": ({"skip_zero_advantage": False}, False, False, "skip_zero_advantage=False"),
    "TRL's head": ({"fused_loss": False}, False, False, "fused_loss=False"),
    "KL": ({"beta": 0.1}, True, False, "every sequence runs: beta=0.1"),
    "whole sequences": ({"loss_type": "vespo"}, False, False, "loss_type='vespo' weighs whole sequences"),
    "entropy quantile": ({"top_entropy_quantile": 0.5}, False, False, "top_entropy_quantile=0.5 depends on the ent"),
    "entropy bonus": ({"entropy_coef": 0.1}, False, False, "the entropy bonus averages over a micro-batch"),
    "off-policy mask": ({"off_policy_mask_threshold": 0.5}, False, False, "off_policy_mask_threshold=0.5"),
    "its own loss": ({"trainer_class": override("_compute_loss")}, False, False, "Own has a _compute_loss of its own"),
    "its own inputs": (
        {"trainer_class": override("_prepare_inputs")},
        False,
        False,
        "Own has a _prepare_inputs of its own",
    ),
}


def runs_of(trainer, batch):
    return trainer._micro_batches.what_runs(trainer._loss_settings(), batch)


@pytest.mark.parametrize("name", CASES)
def test_which_case_applies_is_logged_once(name, tiny_policy, tmp_path, caplog):
    options, regrouped, skipped, why = CASES[name]
    with caplog.at_level(logging.INFO, logger="trl_ext.trainer"):
        trainer = train(tiny_policy, tmp_path, **FOUR, **options)
    runs = runs_of(trainer, {"advantages": torch.zeros(4)})
    assert (runs.regrouped, runs.skipped) == (regrouped, skipped) and why in runs.why
    others = ("in one pass", "Prompts aren't shared")
    (said,) = [one for one in caplog.records if why in one.message and not any(text in one.message for text in others)]
    asked_and_refused = options.get("skip_zero_advantage", True) and not skipped
    assert said.levelname == ("WARNING" if asked_and_refused else "INFO")


def test_images_and_advantages_of_tokens_stay_where_they_are(tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, **FOUR)
    images = {"advantages": torch.zeros(4), "pixel_values": torch.zeros(4, 3)}
    assert not runs_of(trainer, images).regrouped and "images" in runs_of(trainer, images).why
    assert "single tokens" in runs_of(trainer, {"advantages": torch.zeros(4, 5)}).why
    sequence_level = build(tiny_policy, tmp_path, importance_sampling_level="sequence", **FOUR)
    assert runs_of(sequence_level, {"advantages": torch.zeros(4)}).skipped
    off_policy = {"advantages": torch.zeros(4), "old_per_token_logps": torch.zeros(4, 5)}
    assert "off policy" in runs_of(sequence_level, off_policy).why


def test_learned_positions(tiny_policy, tmp_path):
    """GPT-2: a prompt's columns stay, or its positions would change; the gradient is TRL's."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    folder = save_model(config, tiny_policy, tmp_path / "model")
    ours, _ = train_both(folder, tmp_path, reward_with_dead(0.4), **APART, num_iterations=2)
    assert any(log.get("compute/sequences_skipped_frac", 0) > 0 for log in ours.recorder.logs)


# ---- the trainer


def test_entropy_live_is_of_what_has_a_gradient(tiny_policy, tmp_path):
    whole = build(tiny_policy, tmp_path, reward_with_dead(0.5), **FOUR, max_steps=1, skip_zero_advantage=False)
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    batches = [inputs for inputs, _ in loss_batches(whole)]
    whole.model.load_state_dict(start)
    rows = []
    for inputs in batches:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            logits = whole.model(input_ids=ids, attention_mask=mask).logits
        logp = logits[:, -inputs["completion_ids"].shape[1] - 1 : -1].float().log_softmax(-1)
        live = inputs["completion_mask"].bool() & (inputs["advantages"] != 0)[:, None]
        rows.append(-(logp.exp() * logp).sum(-1)[live])
    trainer = train(tiny_policy, tmp_path, reward_with_dead(0.5), **FOUR, max_steps=1)
    entropy = torch.cat(rows)
    assert 0 < len(entropy)
    assert logged(trainer)[0]["entropy_live"] == pytest.approx(entropy.mean().item(), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_dropout_is_logged_once(lora, tiny_policy, tmp_path, caplog):
    adapter = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1) if lora else None
    trainer = build(tiny_policy, tmp_path, peft_config=adapter, **FOUR)
    if not lora:
        trainer.model.model.layers[0].self_attn.attention_dropout = 0.1
    with caplog.at_level(logging.WARNING, logger="trl_ext.trainer"):
        trainer.train()
    assert len(messages(caplog, "dropout")) == 1


def test_tool_output_and_dead_groups(passes, tiny_policy, tmp_path):
    options = {**FOUR, "num_iterations": 2, "learning_rate": 0.05, "max_steps": 4, "generation_kwargs": None}
    trained = []
    for trainer_class in (GRPOTrainer, CurvatureGRPOTrainer):
        options |= {"trainer_class": trainer_class, "rollout_func": tool_rollout}
        passes.clear()
        trained.append(train(tiny_policy, tmp_path, reward_with_dead(0.5), **options))
    assert_same(*trained[::-1])
    assert sum(rows for rows, _ in passes) < 4 * 16


def test_a_mixture_of_experts_with_its_auxiliary_loss(tiny_policy, tmp_path):
    folder = save_model(HEADS["mixture of experts"], tiny_policy, tmp_path / "model")
    ours, _ = train_both(folder, tmp_path, reward_with_dead(0.5), **APART)
    runs = runs_of(ours, {"advantages": torch.zeros(4)})
    assert not runs.regrouped and "auxiliary loss" in runs.why
    assert any(log.get("aux_loss", 0) > 0 for log in ours.recorder.logs)


def test_log_probs_wait_for_rewards(tiny_policy, tmp_path, monkeypatch):
    """Old ones are computed of live sequences alone and trimmed; reference ones of all; with a subclass's, at once."""
    seen = []
    original = GRPOTrainer._get_per_token_logps_and_entropies

    def spy(self, model, input_ids, *rest, **kwargs):
        if not torch.is_grad_enabled():
            seen.append(input_ids.shape)
        return original(self, model, input_ids, *rest, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy)
    options = {**FOUR, "num_iterations": 2}

    trainer = build(tiny_policy, tmp_path, reward_with_dead(0.7), **options)
    trainer.train()
    advantages = torch.tensor(list(trainer._logs["advantages"]))
    assert 0 < sum(rows for rows, _ in seen) == int((advantages != 0).sum()) < 16
    buffered = join(trainer._buffered_inputs)
    dead = buffered["advantages"] == 0
    assert (buffered["old_per_token_logps"][dead] == 0).all()
    live_values = buffered["old_per_token_logps"][~dead][buffered["completion_mask"][~dead].bool()]
    assert (live_values < 0).all()

    seen.clear()
    build(tiny_policy, tmp_path, reward_with_dead(0.7), beta=0.1, **options).train()
    assert sum(rows for rows, _ in seen) == 2 * 16  # old and reference

    class Own(CurvatureGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            assert (output["old_per_token_logps"][output["completion_mask"].bool()] < 0).all()
            return output

    seen.clear()
    build(tiny_policy, tmp_path, reward_with_dead(0.7), trainer_class=Own, **options).train()
    assert sum(len(shape) and shape[0] for shape in seen) == 16


def test_vllms_correction_keeps_old_log_probs_complete(tiny_policy, tmp_path):
    def why(trainer):
        return why_complete(trainer._run.options, trainer._loss_settings(), None)

    trainer = build(tiny_policy, tmp_path)
    assert why(trainer) is None
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    assert "vLLM" in why(trainer)
    trainer.vllm_importance_sampling_correction = False
    assert why(trainer) is None
    assert "skip_zero_advantage" in why(build(tiny_policy, tmp_path, skip_zero_advantage=False))


def test_a_generation_with_one_live_group_runs_in_its_last_micro_batch(tiny_policy, tmp_path):
    """Of four calls one has work when a quarter is alive, and it is the last, which synchronises."""
    synchronised = []

    def one_live(completions, **kwargs):  # of the 16 rows of a generation, one group of four is alive
        return [0.5] * 12 + [0.0, 1.0, 1.0, 0.0]

    trainer = build(tiny_policy, tmp_path, one_live, **FOUR)
    step = trainer.training_step

    def watched(*args):  # put on the trainer: what a subclass does there would be between TRL's own micro-batches
        loss = step(*args)
        synchronised.append(trainer.accelerator.sync_gradients)
        return loss

    trainer.training_step = watched
    trainer.train()
    assert synchronised == [False, False, False, True] * 2
    for log in logged(trainer):
        assert log["compute/micro_batches"] == 1 and log["compute/sequences_skipped_frac"] == 0.75
    assert KEY not in trainer._buffered_inputs[0]


def test_interference_counts_what_was_skipped(tiny_policy, tmp_path):
    """The same prompts, metrics and Gram matrix, whether dead sequences ran or not."""
    options = {"interference_every": 1, "interference_dim": 0, "gradient_accumulation_steps": 4}

    def gram(folder, skip):
        trainer = train(tiny_policy, folder, reward_with_dead(0.5), skip_zero_advantage=skip, **options)
        return read_interference(folder), trainer.recorder.logs

    (ours, our_logs), (whole, whole_logs) = gram(tmp_path / "a", True), gram(tmp_path / "b", False)
    for a, b in zip(ours, whole, strict=True):
        assert sorted(a.prompt_B) == sorted(b.prompt_B)
        order_a, order_b = (
            sorted(range(32), key=lambda i, r=r: (r.prompt_B[i], r.reward_B[i], round(r.gram_BB[i, i], 6)))
            for r in (a, b)
        )
        scale = abs(b.gram_BB).max()
        assert abs(a.gram_BB[order_a][:, order_a] - b.gram_BB[order_b][:, order_b]).max() < 1e-4 * scale
    for ours_log, whole_log in zip(our_logs, whole_logs, strict=True):
        for name, value in whole_log.items():
            if name == "interference/feature_cos_abs_mean":  # of all prompts: of those that ran it has another name
                assert name not in ours_log
            elif name.startswith(("interference/", "theory/", "curvature/")):
                assert ours_log[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert any("interference/feature_cos_abs_mean_live" in log for log in our_logs)
    assert any(log.get("compute/sequences_skipped_frac", 0) > 0 for log in our_logs)


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_an_engine_that_counts_every_backward(share, passes, tiny_policy, tmp_path, monkeypatch):
    """DeepSpeed (made up): all four micro-batches run, with fewer sequences in each; the gradient is TRL's."""
    theirs = train(tiny_policy, tmp_path / "trl", reward_with_dead(share), trainer_class=GRPOTrainer, **APART)
    passes.clear()
    monkeypatch.setattr(micro_batches, "DistributedType", SimpleNamespace(DEEPSPEED=DistributedType.NO))
    assert_same(train(tiny_policy, tmp_path / "ours", reward_with_dead(share), **APART), theirs)
    assert len(passes) == 3 * 4 and sum(rows for rows, _ in passes) < 3 * 16


class OnlyTRLsKeys(CurvatureGRPOTrainer):
    """A subclass that makes the dict anew."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch")
        return {name: output[name] for name in names}


def test_a_subclass_that_returns_trls_keys_alone(tiny_policy, tmp_path):
    ends = [
        train(
            tiny_policy, tmp_path, reward_with_dead(0.6), trainer_class=OnlyTRLsKeys, skip_zero_advantage=skip, **FOUR
        )
        for skip in (True, False)
    ]
    assert_same_gradients(*(trainer.recorder.gradients for trainer in ends))


def test_dead_groups_of_several_functions_are_exactly_dead(tiny_policy, tmp_path):
    """normalize_then_sum: whitening over the batch leaves no residue in them."""
    rewards = [reward_with_dead(0.6), lambda prompts, **kwargs: [1.0] * len(prompts)]
    options = {**FOUR, "multi_objective_aggregation": "normalize_then_sum", "max_steps": 4}
    logs = logged(train(tiny_policy, tmp_path, rewards, **options))
    dead = [log["normalization/zero_variance_frac"] for log in logs]
    skipped = [log["compute/sequences_skipped_frac"] for log in logs]  # and a live group's answer of mean reward
    assert all(s >= d for s, d in zip(skipped, dead, strict=True)) and 0 < sum(dead) < len(dead)


def test_a_step_of_several_generations_is_counted_whole(passes, tiny_policy, tmp_path):
    counted = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            counted.append((1 - sum(rows for rows, _ in passes) / 12, len(passes)))
            passes.clear()

    options = {**FOUR, "gradient_accumulation_steps": 3, "steps_per_generation": 2, "max_steps": 4}
    options |= {"interference_every": 0, "share_prompts": False, "callbacks": [Count()]}
    logs = logged(train(tiny_policy, tmp_path, reward_with_dead(0.5), **options), "compute/micro_batches")
    shares = [(log["compute/sequences_skipped_frac"], log["compute/micro_batches"]) for log in logs]
    assert [pytest.approx(pair) for pair in counted] == shares and len({n for _, n in counted}) > 1


def test_log_probs_are_there_for_reward_functions(tiny_policy, tmp_path):
    """What waits for the rewards is TRL's own call, nobody else's."""
    seen = []

    def reward(completions, **kwargs):
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 2)[0]
        seen.append(found.abs().min().item())
        return digits(completions)

    trainer = build(tiny_policy, tmp_path, reward, **FOUR, max_steps=1)
    trainer.train()
    assert seen and min(seen) > 0


def test_a_step_that_broke_off_leaves_nothing(tiny_policy, tmp_path):
    """Stopped after two of four micro-batches and trained again: the gradients of skip_zero_advantage=False."""

    class Stop(TrainerCallback):
        substeps = 0

        def on_substep_end(self, args, state, control, **kwargs):
            self.substeps += 1
            control.should_training_stop |= self.substeps == 2

    gradients = []
    for skip in (False, True):
        options = {**FOUR, "skip_zero_advantage": skip, "learning_rate": 0.2, "callbacks": [Stop()]}
        trainer = build(tiny_policy, tmp_path / str(skip), reward_with_dead(0.5), **options)
        trainer.train()
        trainer.train()
        gradients.append(trainer.recorder.gradients)
    assert len(gradients[0]) >= 2
    assert_same_gradients(gradients[1], gradients[0], tolerance=1e-4)


def test_a_filler_without_tokens_takes_no_layer_away(tiny_policy, tmp_path, caplog):
    """Truncated completions masked, and every second generation dead: what is logged is what all rows give."""
    options = {"max_steps": 3, "mask_truncated_completions": True, "interference_every": 1}
    options |= {"gradient_accumulation_steps": 4, "steps_per_generation": 2}
    logs = []
    for skip in (True, False):
        calls = []

        def reward(completions, calls=calls, **kwargs):
            calls.append(1)
            return [0.25] * len(completions) if len(calls) % 2 else digits(completions)

        logs.append(logged(train(tiny_policy, tmp_path / str(skip), reward, skip_zero_advantage=skip, **options)))
    assert not messages(caplog, "goes on without layer")
    for ours, whole in zip(*logs, strict=True):
        for name in ("interference/coverage", "theory/r1", "curvature/fisher_trace_mean", "interference/cos_mean"):
            assert ours.get(name) == pytest.approx(whole.get(name), rel=1e-3), name


# ---- two processes


@pytest.mark.parametrize("options", [{}, {"beta": 0.02, "num_iterations": 2}], ids=["DDP", "KL"])
def test_two_processes_with_different_live_counts(options, tiny_policy, tmp_path):
    """24 rows a process in four micro-batches, most groups dead, unevenly split: TRL's run, in fewer passes."""
    options = {**options, "gradient_accumulation_steps": 4, "steps_per_generation": 4, "max_steps": 4, "dead": 0.6}
    options["per_device_train_batch_size"] = 6
    theirs = run_processes(2, tiny_policy, tmp_path / "trl", trainer="trl", **options)
    ours = run_processes(2, tiny_policy, tmp_path / "ours", **options)
    assert_same_run(ours[0], theirs[0])
    for parameter, value in ours[0]["parameters"].items():
        assert torch.equal(value, ours[1]["parameters"][parameter])
    live = [rank["live_by_step"] for rank in ours]
    logs = [log for log in ours[0]["logs"] if "compute/micro_batches" in log]
    if not options.get("beta"):
        assert live[0] != live[1], "both had as much to do, so nothing was tried"
        assert any(log["compute/micro_batches"] < 4 for log in logs)


# ---- random numbers, and what is logged of the work


def test_neftune_keeps_rows_as_they_are(tiny_policy, tmp_path, monkeypatch, caplog):
    """The noise on an embedding is at most alpha / sqrt(length of the row * width): a row keeps TRL's length."""
    from transformers.integrations import neftune

    noisy = neftune.neftune_post_forward_hook
    results = []
    for trainer_class in (GRPOTrainer, CurvatureGRPOTrainer):
        lengths = set()

        def keep(module, args, output, lengths=lengths):
            if module.training and torch.is_grad_enabled():
                lengths.add(output.shape[1])
            return noisy(module, args, output)

        monkeypatch.setattr(neftune, "neftune_post_forward_hook", keep)
        options = {"per_device_train_batch_size": 16, "neftune_noise_alpha": 5.0, "trainer_class": trainer_class}
        with caplog.at_level(logging.WARNING, logger="trl_ext"):
            train(tiny_policy, tmp_path, **options)
        results.append(lengths)
    theirs, ours = results
    assert ours and ours <= theirs
    assert len(messages(caplog, "NEFTune's noise depends on the length of a row")) == 1


def test_a_step_of_ones_own_is_warned_of_with_its_cost(tiny_policy, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        train(tiny_policy, tmp_path, trainer_class=override("training_step"), **FOUR)
    said = [one for one in caplog.records if "Own has a training_step of its own" in one.message]
    (said,) = [one for one in said if "Prompts aren't shared" not in one.message]
    assert said.levelname == "WARNING" and "2 to 5 times as long" in said.message


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    options=st.fixed_dictionaries(
        {
            "share_prompts": st.booleans(),
            "skip_zero_advantage": st.booleans(),
            "beta": st.sampled_from([0.0, 0.05]),
            "pad_to_multiple_of": st.sampled_from([None, 8]),
            "interference_every": st.sampled_from([0, 1]),
            "gradient_accumulation_steps": st.sampled_from([1, 4]),
        }
    ),
    dead=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_shares_of_work_are_shares(options, dead, tiny_policy, tmp_path):
    rows = 16 // options["gradient_accumulation_steps"]
    trainer = train(
        tiny_policy, tmp_path, reward_with_dead(dead), max_steps=1, per_device_train_batch_size=rows, **options
    )
    (entry,) = logged(trainer, "compute/micro_batches")
    shares = {name: value for name, value in entry.items() if name.startswith("compute/") and name.endswith("_frac")}
    assert shares and all(0 <= value <= 1 for value in shares.values()), shares
