"""What is logged of the work that skipping saves, and log-probs that wait until rewards say which are needed."""

import pytest
import torch
from harness import FOUR, build, digits, logged, loss_batches, messages, reward_with_dead, table, train
from transformers import TrainerCallback
from transformers.integrations import neftune
from trl import GRPOTrainer

from trl_ext import CurvatureGRPOTrainer, read_interference
from trl_ext.compat import read_loss_settings
from trl_ext.options import read_options
from trl_ext.plan import log_probs
from trl_ext.plan.log_probs import why_not_postponed


def test_entropy_live_is_of_what_has_a_gradient(tiny_policy, tmp_path):
    whole = build(tiny_policy, tmp_path, reward_with_dead(0.5), **FOUR, max_steps=1, skip_zero_advantage=False)
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    batches = [inputs for inputs, _ in loss_batches(whole)]
    whole.model.load_state_dict(start)
    entropies = []
    for inputs in batches:
        ids, mask = (
            torch.cat([inputs[f"{part}_{what}"] for part in ("prompt", "completion")], 1) for what in ("ids", "mask")
        )
        with torch.no_grad():
            logits = whole.model(input_ids=ids, attention_mask=mask).logits
        logp = logits[:, -inputs["completion_ids"].shape[1] - 1 : -1].float().log_softmax(-1)
        live = inputs["completion_mask"].bool() & (inputs["advantages"] != 0)[:, None]
        entropies.append(-(logp.exp() * logp).sum(-1)[live])
    entropy = torch.cat(entropies)
    assert len(entropy) > 0
    trainer = train(tiny_policy, tmp_path, reward_with_dead(0.5), **FOUR, max_steps=1)
    assert logged(trainer)[0]["entropy_live"] == pytest.approx(entropy.mean().item(), rel=1e-5)


def test_log_probs_wait_for_rewards(tiny_policy, tmp_path, monkeypatch):
    """Old ones are computed of live sequences alone and trimmed; reference ones of all; with a subclass's, at once."""
    seen = []
    original, score = CurvatureGRPOTrainer._get_per_token_logps_and_entropies, log_probs.score

    def at_once(self, model, input_ids, *rest, **kwargs):
        if not torch.is_grad_enabled():
            seen.append(len(input_ids))
        return original(self, model, input_ids, *rest, **kwargs)

    def afterwards(model, batch, *rest, **kwargs):
        seen.append(len(batch))
        return score(model, batch, *rest, **kwargs)

    monkeypatch.setattr(CurvatureGRPOTrainer, "_get_per_token_logps_and_entropies", at_once)
    monkeypatch.setattr(log_probs, "score", afterwards)
    options = {**FOUR, "num_iterations": 2}

    trainer = build(tiny_policy, tmp_path, reward_with_dead(0.7), **options)
    batches = [inputs for inputs, _ in loss_batches(trainer)]
    advantages = torch.tensor(table(trainer, "advantages"))
    assert 0 < sum(seen) == int((advantages != 0).sum()) < 16
    for inputs in batches:
        live = inputs["completion_mask"].bool() & (inputs["advantages"] != 0)[:, None]
        assert (inputs["old_per_token_logps"][live] < 0).all()

    seen.clear()
    train(tiny_policy, tmp_path, reward_with_dead(0.7), beta=0.1, **options)
    assert sum(seen) == 2 * 16  # old and reference

    class Own(CurvatureGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            assert (output["old_per_token_logps"][output["completion_mask"].bool()] < 0).all()
            return output

    seen.clear()
    train(tiny_policy, tmp_path, reward_with_dead(0.7), trainer_class=Own, **options)
    assert sum(seen) == 16


def test_vllms_correction_keeps_old_log_probs_complete(tiny_policy, tmp_path):
    def why(trainer):
        return why_not_postponed(read_options(trainer.args), read_loss_settings(trainer), None)

    trainer = build(tiny_policy, tmp_path)
    assert why(trainer) is None
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    assert "vLLM" in why(trainer)
    trainer.vllm_importance_sampling_correction = False
    assert why(trainer) is None
    trainer.args.skip_zero_advantage = False
    assert "skip_zero_advantage" in why(trainer)


def test_interference_counts_what_was_skipped(tiny_policy, tmp_path):
    """The same prompts, metrics and Gram matrix, whether dead sequences ran or not."""
    options = {"interference_every": 1, "interference_dim": 0, "gradient_accumulation_steps": 4}

    def records_and_logs(skip):
        folder = tmp_path / str(skip)
        logs = train(tiny_policy, folder, reward_with_dead(0.5), skip_zero_advantage=skip, **options).recorder.logs
        return read_interference(folder), logs

    def sorted_gram(record):
        """Its rows by prompt and reward, whatever micro-batch they ran in."""
        keys = [*zip(record.prompt_B, record.reward_B, record.gram_BB.diagonal().round(6), strict=True)]
        order = sorted(range(32), key=keys.__getitem__)
        return record.gram_BB[order][:, order]

    (ours, our_logs), (whole, whole_logs) = records_and_logs(True), records_and_logs(False)
    for a, b in zip(ours, whole, strict=True):
        assert sorted(a.prompt_B) == sorted(b.prompt_B)
        assert abs(sorted_gram(a) - sorted_gram(b)).max() < 1e-4 * abs(b.gram_BB).max()
    for ours_log, whole_log in zip(our_logs, whole_logs, strict=True):
        for name, value in whole_log.items():
            if name == "interference/feature_cos_abs_mean":  # of all prompts: of those that ran it has another name
                assert name not in ours_log
            elif name.startswith(("interference/", "theory/", "curvature/")):
                assert ours_log[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert any("interference/feature_cos_abs_mean_live" in log for log in our_logs)
    assert any(log.get("compute/sequences_skipped_frac", 0) > 0 for log in our_logs)


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


def test_neftune_keeps_rows_as_they_are(tiny_policy, tmp_path, monkeypatch, caplog):
    """The noise on an embedding is at most alpha / sqrt(length of the row * width): a row keeps TRL's length."""
    noisy = neftune.neftune_post_forward_hook

    def row_lengths(trainer_class):
        lengths = set()

        def keep(module, args, output):
            if module.training and torch.is_grad_enabled():
                lengths.add(output.shape[1])
            return noisy(module, args, output)

        monkeypatch.setattr(neftune, "neftune_post_forward_hook", keep)
        options = {"per_device_train_batch_size": 16, "neftune_noise_alpha": 5.0, "trainer_class": trainer_class}
        train(tiny_policy, tmp_path, **options)
        return lengths

    theirs, ours = row_lengths(GRPOTrainer), row_lengths(CurvatureGRPOTrainer)
    assert ours and ours <= theirs
    assert len(messages(caplog, "NEFTune's noise depends on the length of a row")) == 1
