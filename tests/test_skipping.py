"""Sequences without a gradient don't run, the others are regrouped: the same gradient and metrics, for less."""

import logging
import zlib
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from allpairspy import AllPairs
from architectures import build as architecture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_fused_trainer import TINY, tool_rollout
from test_trainer_equality import PLAIN, Recorder, assert_same, digits, norm_of, prompts, run
from test_two_processes import assert_same_run
from test_two_processes import run as run_processes
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, MambaConfig, MixtralConfig, OPTConfig, TrainerCallback
from transformers.models.auto import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.plan import columns, micro_batches
from trl_ext.plan.micro_batches import KEY, StepCounts, compute_metrics
from trl_ext.plan.padding import columns_by_rule, moved_by_padding, trimmed_columns
from trl_ext.plan.rows import even_batches, join, read_rows, select
from trl_ext.plan.rules import random_layers

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


def dead_share(prompt, share):
    return zlib.crc32(prompt[0]["content"].encode()) % 100 < 100 * share


def reward_with_dead(share):
    """As ``digits``, but of equal rewards for this share of the prompts; 0.25 and 1 have an exact mean."""

    def reward(completions, prompts, **kwargs):
        values = digits(completions)
        return [0.25 if dead_share(p, share) else v for p, v in zip(prompts, values, strict=True)]

    return reward


SHARES = {"most": 0.7, "all": 1.0, "none": 0.0}


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


def train(trainer_class, config_class, policy, folder, setting, **extra):
    setting = {**PLAIN, **{name: value for name, value in setting.items() if name in PLAIN}}
    return run(trainer_class, config_class, policy, folder, setting, per_device_train_batch_size=4, **extra)


@pytest.mark.parametrize("setting", DESIGN, ids=lambda s: "-".join(str(v).replace(" ", "") for v in s.values()))
def test_same_gradient_for_less(setting, passes, tiny_policy, tmp_path):
    extra = {"reward": reward_with_dead(SHARES[setting["dead"]]), "pad_to_multiple_of": setting["pad_to_multiple_of"]}
    theirs = train(GRPOTrainer, GRPOConfig, tiny_policy, tmp_path / "trl", setting, **extra)
    full = sum(rows * columns for rows, columns in passes)
    passes.clear()
    ours = train(CurvatureGRPOTrainer, CurvatureGRPOConfig, tiny_policy, tmp_path / "ours", setting, **extra)
    assert_same(ours, theirs, small_kl=setting["beta"] > 0)
    run_here = sum(rows * columns for rows, columns in passes)
    alive = [any(g.abs().sum() > 0 for g in step.values()) for step in theirs[1].gradients]
    assert any(alive) == (setting["dead"] != "all")
    logs = [log for log in ours[1].logs if "compute/tokens_run" in log]
    if setting["loss_type"] == "vespo":
        assert run_here == full and all(log["compute/flops_saved_frac"] == 0 for log in logs)
    elif setting["beta"] == 0 and setting["dead"] != "none":
        assert run_here < 0.8 * full
        assert all(log["compute/sequences_skipped_frac"] > 0 for log in logs if setting["dead"] == "all")
    else:
        assert run_here <= full
    if logs and setting["accumulation"] == (4, 4):  # what is logged is what was run
        assert run_here / full == pytest.approx(
            1 - sum(log["compute/flops_saved_frac"] for log in logs) / len(logs), rel=0.1
        )


# ---- which case applies, and why


def build(policy, folder, reward_funcs=digits, trainer_class=CurvatureGRPOTrainer, peft_config=None, **options):
    config = CurvatureGRPOConfig(
        **{
            **dict(
                output_dir=str(folder), num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=4,
                max_completion_length=8, max_steps=2, optim="sgd", learning_rate=0.02, logging_steps=1, bf16=False,
                gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
                seed=7, generation_kwargs={"sequence_bias": [[[1], 5.0]]},
            ),
            **options,
        }
    )  # fmt: skip
    recorder = Recorder()
    trainer = trainer_class(
        model=str(policy), reward_funcs=reward_funcs, args=config, train_dataset=prompts(64),
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"), peft_config=peft_config,
        callbacks=[recorder],
    )  # fmt: skip
    trainer.recorder = recorder
    return trainer


class OwnLoss(CurvatureGRPOTrainer):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs)


class OwnInputs(CurvatureGRPOTrainer):
    def _prepare_inputs(self, generation_batch):
        return super()._prepare_inputs(generation_batch)


CASES = {
    "skipped": ({}, True, True, "sequences of advantage 0 don't run"),
    "asked for": ({"skip_zero_advantage": False}, False, False, "skip_zero_advantage=False"),
    "TRL's head": ({"fused_loss": False}, False, False, "fused_loss=False"),
    "KL": ({"beta": 0.1}, True, False, "every sequence runs: beta=0.1"),
    "whole sequences": ({"loss_type": "vespo"}, False, False, "loss_type='vespo' weighs whole sequences"),
    "entropy quantile": ({"top_entropy_quantile": 0.5}, False, False, "top_entropy_quantile=0.5 depends on the ent"),
    "entropy bonus": ({"entropy_coef": 0.1}, False, False, "the entropy bonus averages over a micro-batch"),
    "off-policy mask": ({"off_policy_mask_threshold": 0.5}, False, False, "off_policy_mask_threshold=0.5"),
    "its own loss": ({"trainer_class": OwnLoss}, False, False, "OwnLoss has a _compute_loss of its own"),
    "its own inputs": ({"trainer_class": OwnInputs}, False, False, "OwnInputs has a _prepare_inputs of its own"),
}


def runs_of(trainer, batch):
    return trainer._micro_batches.what_runs(trainer._loss_settings(), batch)


@pytest.mark.parametrize("name", CASES)
def test_which_case_applies_is_said(name, tiny_policy, tmp_path, caplog):
    options, regrouped, skipped, why = CASES[name]
    trainer = build(tiny_policy, tmp_path, **options)
    runs = runs_of(trainer, {"advantages": torch.zeros(4)})
    assert (runs.regrouped, runs.skipped) == (regrouped, skipped) and why in runs.why
    with caplog.at_level(logging.INFO, logger="trl_ext.trainer"):
        trainer.train()
    said = [record for record in caplog.records if why in record.message]
    said = [
        record
        for record in said
        if "in one pass" not in record.message and "Prompts aren't shared" not in record.message
    ]
    assert len(said) == 1, "once in a run"
    asked_and_refused = trainer._run.options.skip_zero_advantage and not skipped
    assert said[0].levelname == ("WARNING" if asked_and_refused else "INFO")


def test_images_and_advantages_of_tokens_stay_where_they_are(tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path)
    images = {"advantages": torch.zeros(4), "pixel_values": torch.zeros(4, 3)}
    assert not runs_of(trainer, images).regrouped and "images" in runs_of(trainer, images).why
    assert "single tokens" in runs_of(trainer, {"advantages": torch.zeros(4, 5)}).why
    sequence_level = build(tiny_policy, tmp_path, importance_sampling_level="sequence")
    assert runs_of(sequence_level, {"advantages": torch.zeros(4)}).skipped
    off_policy = {"advantages": torch.zeros(4), "old_per_token_logps": torch.zeros(4, 5)}
    assert "off policy" in runs_of(sequence_level, off_policy).why


SMALL = {**TINY, "vocab_size": 50}
MODELS = {
    "rotary": (LlamaConfig(**SMALL), (True, True)),
    "positions learned": (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50), (False, True)),
    "state": (MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50), (False, True)),
    "rotation by length": (
        LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        (False, False),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_columns_are_cut_where_nothing_changes(name):
    """What is said of a model is what its own forward does, with padding and without."""
    config, expected = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert columns_by_rule(model) == expected
    ids, mask = torch.randint(4, 50, (1, 9)), torch.ones(1, 9, dtype=torch.long)
    wide = [torch.nn.functional.pad(x, (5, 0)) for x in (ids, mask)]
    with torch.no_grad():
        bare, padded = model(ids, attention_mask=mask).logits, model(wide[0], attention_mask=wide[1]).logits[:, 5:]
    if name == "positions learned":  # the reason why its columns stay
        assert (bare - padded).abs().max() > 1e-3
    if expected[0]:
        torch.testing.assert_close(bare, padded, rtol=1e-4, atol=1e-5)


def test_attention_in_chunks_keeps_its_columns():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    model.config.attention_chunk_size = 4
    assert columns_by_rule(model) == (False, True)


def test_a_model_that_moves_with_padding_is_found_out(monkeypatch):
    """HunYuan has a norm after its rotation: were it not in the rule, the model would still be asked."""
    assert columns_by_rule(architecture("hunyuan_v1_dense")) == (False, True)
    monkeypatch.setattr(columns, "NORM_AFTER_ROTATION", ())
    alone, said = SimpleNamespace(distributed_type=DistributedType.NO), []
    for name, moves in (("hunyuan_v1_dense", True), ("llama", False)):
        model = architecture(name).train()
        model.lm_head.eval()
        assert columns_by_rule(model) == (True, True)
        moved = moved_by_padding(model)
        assert moved > 1e-3 if moves else moved < 1e-6
        assert trimmed_columns(model, alone, said.append) == (not moves, True)
        assert model.model.training and not model.lm_head.training
    assert len(said) == 1 and "Padding before prompts stays: what the model says changes with it" in said[0]
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)  # its parameters are elsewhere: by rule
    assert trimmed_columns(architecture("hunyuan_v1_dense"), sharded, said.append) == (True, True)
    monster = architecture("llama")
    monster.forward = lambda **kwargs: 1 / 0
    assert trimmed_columns(monster, alone, said.append) == (False, True) and "ZeroDivisionError" in said[-1]


def test_learned_positions(tiny_policy, tmp_path):
    """GPT-2: a prompt's columns stay, or its positions would change; the gradient is TRL's."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=len(tokenizer), resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    folder = tmp_path / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    extra = {"reward": reward_with_dead(0.4), "gradient_checkpointing": False}
    setting = {"accumulation": (4, 4), "num_iterations": 2}
    theirs = train(GRPOTrainer, GRPOConfig, folder, tmp_path / "trl", setting, **extra)
    ours = train(CurvatureGRPOTrainer, CurvatureGRPOConfig, folder, tmp_path / "ours", setting, **extra)
    assert_same(ours, theirs)
    assert any(log.get("compute/sequences_skipped_frac", 0) > 0 for log in ours[1].logs)


OPT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 50,
       "word_embed_proj_dim": 32}  # fmt: skip


# ---- the parts


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=24), st.integers(1, 6))
def test_even_batches(rows, n_batches):
    wanted_B = torch.tensor([wanted for wanted, _ in rows])
    length_B = torch.tensor([length for _, length in rows])
    n_batches = min(n_batches, len(rows))
    batches = even_batches(wanted_B, length_B, n_batches)
    chosen = torch.cat(batches).tolist()
    assert len(batches) == n_batches and all(len(batch) > 0 for batch in batches)
    assert len(set(chosen)) == len(chosen) and set(wanted_B.nonzero().flatten().tolist()) <= set(chosen)
    assert len(chosen) == max(int(wanted_B.sum()), n_batches)
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    fillers = [row for row in chosen if not wanted_B[row]]
    left = [length_B[row] for row in range(len(rows)) if row not in chosen]
    assert not fillers or all(max(length_B[row] for row in fillers) <= length for length in left)
    empty_B = length_B % 3 == 0  # rows without a token that counts make up for others last of all
    fillers = [
        row for row in torch.cat(even_batches(wanted_B, length_B, n_batches, empty_B)).tolist() if not wanted_B[row]
    ]
    assert not empty_B[fillers].any() or empty_B[~wanted_B].sum() + len(fillers) > (~wanted_B).sum()
    lengths = length_B[[row for row in chosen if wanted_B[row]]]
    assert (lengths[:-1] >= lengths[1:]).all()


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=2, max_size=8),
    st.data(),
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from([None, 2, 4]),
)
def test_select_loses_padding_alone(lengths, data, trim, multiple_of):
    n, prompt_width, completion_width = len(lengths), 8, 8
    generator = torch.Generator().manual_seed(n)
    prompt_mask = torch.stack([torch.arange(prompt_width) >= prompt_width - p for p, _ in lengths]).long()
    completion_mask = torch.stack([torch.arange(completion_width) < c for _, c in lengths]).long()
    ids = torch.randint(1, 99, (n, prompt_width + completion_width), generator=generator)
    rows = {
        "prompt_ids": ids[:, :prompt_width] * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, prompt_width:] * completion_mask,
        "completion_mask": completion_mask,
        "old_per_token_logps": torch.randn(n, completion_width, generator=generator) * completion_mask,
        "importance_sampling_ratio": torch.rand(n, 1, generator=generator),
        "token_type_ids": ids,
        "advantages": torch.randn(n, generator=generator),
        "names": [str(i) for i in range(n)],
        "num_items_in_batch": torch.tensor(3),
    }
    index = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True)))
    got = select(rows, index, read_rows(rows, torch.ones(n, dtype=torch.bool)), trim, multiple_of)
    for side, start in (("prompt", None), ("completion", 0)):
        width, kept = rows[f"{side}_mask"].shape[1], got[f"{side}_mask"].shape[1]
        cut = slice(width - kept, width) if start is None else slice(0, kept)
        for name in (f"{side}_ids", f"{side}_mask"):
            assert torch.equal(got[name], rows[name][index][:, cut])
            assert got[name].sum() == rows[name][index].sum()  # nothing but zeros is gone
        longest = max(1, int(rows[f"{side}_mask"][index].sum(1).max()))
        expected = longest if multiple_of is None else -(-longest // multiple_of) * multiple_of
        assert kept == (expected if trim[side == "completion"] else width)
    assert got["old_per_token_logps"].shape == got["completion_ids"].shape
    both = torch.cat([got["prompt_mask"], got["completion_mask"]], 1)
    assert got["token_type_ids"].shape == both.shape
    assert torch.equal(got["token_type_ids"] * both, torch.cat([got["prompt_ids"], got["completion_ids"]], 1))
    assert got["importance_sampling_ratio"].shape == (len(index), 1)
    assert got["names"] == [str(i) for i in index.tolist()] and got["num_items_in_batch"] == 3


def test_join_is_the_way_back():
    rows = {"a": torch.arange(12).view(6, 2), "names": list("abcdef"), "n": torch.tensor(2)}
    parts = [{"a": rows["a"][i : i + 2], "names": rows["names"][i : i + 2], "n": rows["n"]} for i in (0, 2, 4)]
    whole = join(parts)
    assert torch.equal(whole["a"], rows["a"]) and whole["names"] == rows["names"] and whole["n"] == 2


def test_compute_metrics_by_hand():
    counts = StepCounts(
        micro_batches=2, sequences=16, sequences_run=6, tokens=200, tokens_run=80, positions=320, positions_run=90,
    )  # fmt: skip
    assert compute_metrics(counts) == pytest.approx(
        {
            "compute/sequences_skipped_frac": 10 / 16,
            "compute/tokens_skipped_frac": 0.6,
            "compute/tokens_run": 80.0,
            "compute/padding_removed_frac": 1 - 10 / 120,
            "compute/micro_batches": 2.0,
            "compute/flops_saved_frac": 1 - 90 / 320,
        }
    )
    assert compute_metrics(StepCounts(1, 4, 4, 20, 20, 20, 20))["compute/padding_removed_frac"] == 0


# ---- the trainer


def test_entropy_live_is_of_what_has_a_gradient(tiny_policy, tmp_path):
    whole = build(tiny_policy, tmp_path, reward_with_dead(0.5), max_steps=1, skip_zero_advantage=False)
    rows = []
    one_pass = whole._compute_loss

    def keep(model, inputs):
        with torch.no_grad():
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            logits = model(input_ids=ids, attention_mask=mask).logits[:, -inputs["completion_ids"].shape[1] - 1 : -1]
            logp = logits.float().log_softmax(-1)
            live = inputs["completion_mask"].bool() & (inputs["advantages"] != 0)[:, None]
            rows.append(-(logp.exp() * logp).sum(-1)[live])
        return one_pass(model, inputs)

    whole._compute_loss = keep
    whole.train()
    trainer = build(tiny_policy, tmp_path, reward_with_dead(0.5), max_steps=1)  # seeds torch, as the other did
    trainer.train()
    entropy = torch.cat(rows)
    assert 0 < len(entropy)
    assert trainer.recorder.logs[0]["entropy_live"] == pytest.approx(entropy.mean().item(), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_dropout_is_said_once(lora, tiny_policy, tmp_path, caplog):
    adapter = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1) if lora else None
    trainer = build(tiny_policy, tmp_path, peft_config=adapter)
    if not lora:
        trainer.model.model.layers[0].self_attn.attention_dropout = 0.1
    with caplog.at_level(logging.WARNING, logger="trl_ext.trainer"):
        trainer.train()
    assert sum("dropout" in record.message for record in caplog.records) == 1
    assert not random_layers(build(tiny_policy, tmp_path).model)
    functional = OPTConfig(**OPT, dropout=0.1)  # of which no module is made
    assert random_layers(AutoModelForCausalLM.from_config(functional))
    assert not random_layers(AutoModelForCausalLM.from_config(OPTConfig(**OPT, dropout=0.0)))


def test_tool_output_and_dead_groups(passes, tiny_policy, tmp_path):
    results = []
    for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (CurvatureGRPOTrainer, CurvatureGRPOConfig)):
        config = config_class(
            output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=4,
            max_completion_length=8, max_steps=4, num_iterations=2, optim="sgd", learning_rate=0.05, logging_steps=1,
            lr_scheduler_type="constant", bf16=False, save_strategy="no", gradient_checkpointing=False,
            report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        recorder = Recorder()
        trainer = trainer_class(
            model=str(tiny_policy), reward_funcs=reward_with_dead(0.5), args=config, train_dataset=prompts(32),
            processing_class=AutoTokenizer.from_pretrained(tiny_policy, padding_side="left"),
            rollout_func=tool_rollout, callbacks=[recorder],
        )  # fmt: skip
        passes.clear()
        trainer.train()
        results.append((trainer, recorder, {n: p.detach() for n, p in trainer.model.named_parameters()}))
    assert_same(results[1], results[0])
    assert sum(rows for rows, _ in passes) < 4 * 16


def test_a_mixture_of_experts_with_its_auxiliary_loss(tiny_policy, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    config = MixtralConfig(
        **TINY, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5, vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    extra = {"reward": reward_with_dead(0.5)}
    setting = {"accumulation": (4, 4)}
    theirs = train(GRPOTrainer, GRPOConfig, folder, tmp_path / "trl", setting, **extra)
    ours = train(CurvatureGRPOTrainer, CurvatureGRPOConfig, folder, tmp_path / "ours", setting, **extra)
    assert_same(ours, theirs)
    runs = runs_of(ours[0], {"advantages": torch.zeros(4)})
    assert not runs.regrouped and "auxiliary loss" in runs.why
    assert any(log.get("aux_loss", 0) > 0 for log in ours[1].logs)


def test_log_probs_wait_for_rewards(tiny_policy, tmp_path, monkeypatch):
    """Old ones are computed of live sequences alone and trimmed; reference ones of all; with a subclass's, at once."""
    seen = []
    original = GRPOTrainer._get_per_token_logps_and_entropies

    def spy(self, model, input_ids, *rest, **kwargs):
        if not torch.is_grad_enabled():
            seen.append(input_ids.shape)
        return original(self, model, input_ids, *rest, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy)
    options = {"num_iterations": 2, "max_steps": 2}

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
    from trl_ext.plan.postponed_logprobs import why_complete

    def why(trainer):
        return why_complete(trainer._run.options, trainer._loss_settings(), None)

    trainer = build(tiny_policy, tmp_path)
    assert why(trainer) is None
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    assert "vLLM" in why(trainer)
    trainer.vllm_importance_sampling_correction = False
    assert why(trainer) is None
    assert "skip_zero_advantage" in why(build(tiny_policy, tmp_path, skip_zero_advantage=False))


def test_nothing_is_handed_on_where_nothing_runs(tiny_policy, tmp_path):
    """Of four calls one has work when a quarter is alive, and it is the last, which synchronises."""
    synchronised = []

    def one_live(completions, **kwargs):  # of the 16 rows of a generation, one group of four is alive
        return [0.5] * 12 + [0.0, 1.0, 1.0, 0.0]

    trainer = build(tiny_policy, tmp_path, one_live, max_steps=2)
    step = trainer.training_step

    def watched(*args):  # put on the trainer: what a subclass does there would be between TRL's own micro-batches
        loss = step(*args)
        synchronised.append(trainer.accelerator.sync_gradients)
        return loss

    trainer.training_step = watched
    trainer.train()
    assert synchronised == [False, False, False, True] * 2
    assert all(log["compute/micro_batches"] == 1 for log in trainer.recorder.logs if "reward" in log)
    assert all(log["compute/sequences_skipped_frac"] == 0.75 for log in trainer.recorder.logs if "reward" in log)
    assert KEY not in trainer._buffered_inputs[0]


def test_interference_counts_what_was_skipped(tiny_policy, tmp_path):
    """The same prompts, metrics and Gram matrix, whether dead sequences ran or not."""
    from trl_ext import read_interference

    def gram(folder, skip):
        trainer = build(
            tiny_policy, folder, reward_with_dead(0.5), interference_every=1, interference_dim=0, max_steps=2,
            skip_zero_advantage=skip, per_device_train_batch_size=8, gradient_accumulation_steps=4,
        )  # fmt: skip
        trainer.train()
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
    extra = {"reward": reward_with_dead(share)}
    setting = {"accumulation": (4, 4)}
    theirs = train(GRPOTrainer, GRPOConfig, tiny_policy, tmp_path / "trl", setting, **extra)
    passes.clear()
    monkeypatch.setattr(micro_batches, "DistributedType", SimpleNamespace(DEEPSPEED=DistributedType.NO))
    ours = train(CurvatureGRPOTrainer, CurvatureGRPOConfig, tiny_policy, tmp_path / "ours", setting, **extra)
    assert_same(ours, theirs)
    assert len(passes) == 3 * 4 and sum(rows for rows, _ in passes) < 3 * 16


class OnlyTRLsKeys(CurvatureGRPOTrainer):
    """A subclass that makes the dict anew."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch")
        return {name: output[name] for name in names}


def test_a_subclass_that_returns_trls_keys_alone(tiny_policy, tmp_path):
    ends = [
        build(tiny_policy, tmp_path, reward_with_dead(0.6), trainer_class=OnlyTRLsKeys, skip_zero_advantage=skip)
        for skip in (True, False)
    ]
    for trainer in ends:
        torch.manual_seed(0)
        trainer.train()
    for a, b in zip(*(trainer.recorder.gradients for trainer in ends), strict=True):
        assert norm_of({name: a[name] - b[name] for name in a}) <= 1e-5 * norm_of(b)


def test_dead_groups_of_several_functions_are_exactly_dead(tiny_policy, tmp_path):
    """normalize_then_sum: whitening over the batch leaves no residue in them."""
    rewards = [reward_with_dead(0.6), lambda prompts, **kwargs: [1.0] * len(prompts)]
    trainer = build(
        tiny_policy, tmp_path, rewards, multi_objective_aggregation="normalize_then_sum", max_steps=4
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.recorder.logs if "reward" in log]
    dead = [log["normalization/zero_variance_frac"] for log in logs]
    skipped = [log["compute/sequences_skipped_frac"] for log in logs]  # and a live group's answer of mean reward
    assert all(s >= d for s, d in zip(skipped, dead, strict=True)) and 0 < sum(dead) < len(dead)


def test_a_step_of_several_generations_is_counted_whole(passes, tiny_policy, tmp_path):
    trainer = build(
        tiny_policy, tmp_path, reward_with_dead(0.5), max_steps=4, gradient_accumulation_steps=3,
        steps_per_generation=2, interference_every=0, share_prompts=False,
    )  # fmt: skip
    counted = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            counted.append((1 - sum(rows for rows, _ in passes) / 12, len(passes)))
            passes.clear()

    trainer.add_callback(Count())
    trainer.train()
    logs = [log for log in trainer.recorder.logs if "reward" in log or "compute/micro_batches" in log]
    logged = [(log["compute/sequences_skipped_frac"], log["compute/micro_batches"]) for log in logs]
    assert [pytest.approx(pair) for pair in counted] == logged and len({n for _, n in counted}) > 1


def test_log_probs_are_there_for_reward_functions(tiny_policy, tmp_path):
    """What waits for the rewards is TRL's own call, nobody else's."""
    seen = []

    def reward(completions, **kwargs):
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 2)[0]
        seen.append(found.abs().min().item())
        return digits(completions)

    trainer = build(tiny_policy, tmp_path, reward, max_steps=1)
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
        trainer = build(
            tiny_policy, tmp_path / str(skip), reward_with_dead(0.5), skip_zero_advantage=skip, learning_rate=0.2
        )  # fmt: skip
        trainer.add_callback(Stop())
        trainer.train()
        trainer.train()
        gradients.append(trainer.recorder.gradients)
    assert len(gradients[0]) == len(gradients[1]) >= 2
    for whole, skipped in zip(*gradients, strict=True):
        assert norm_of({name: whole[name] - skipped[name] for name in whole}) <= 1e-4 * norm_of(whole)


def test_a_filler_without_tokens_takes_no_layer_away(tiny_policy, tmp_path, caplog):
    """Truncated completions masked, and every second generation dead: what is logged is what all rows give."""
    logs = []
    for skip in (True, False):
        calls = []

        def reward(completions, calls=calls, **kwargs):
            calls.append(1)
            return [0.25] * len(completions) if len(calls) % 2 else digits(completions)

        trainer = build(
            tiny_policy, tmp_path / str(skip), reward, max_steps=3, mask_truncated_completions=True,
            interference_every=1, skip_zero_advantage=skip, per_device_train_batch_size=8, steps_per_generation=2,
        )  # fmt: skip
        trainer.train()
        logs.append([log for log in trainer.recorder.logs if "reward" in log])
    assert not any("goes on without layer" in record.message for record in caplog.records)
    for ours, whole in zip(*logs, strict=True):
        for name in ("interference/coverage", "theory/r1", "curvature/fisher_trace_mean", "interference/cos_mean"):
            assert ours.get(name) == pytest.approx(whole.get(name), rel=1e-3), name


# ---- two processes


TWO = {
    "DDP": {},
    "KL": {"beta": 0.02, "num_iterations": 2},
}


@pytest.mark.parametrize("name", TWO)
def test_two_processes_with_different_live_counts(name, tiny_policy, tmp_path):
    """24 rows a process in four micro-batches, most groups dead, unevenly split: TRL's run, in fewer passes."""
    options = {
        "gradient_accumulation_steps": 4, "per_device_train_batch_size": 6, "steps_per_generation": 4, "max_steps": 4,
        **TWO[name],
    }  # fmt: skip
    theirs = run_processes(2, tiny_policy, tmp_path / "trl", trainer="trl", dead=0.6, **options)
    ours = run_processes(2, tiny_policy, tmp_path / "ours", dead=0.6, **options)
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
    for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (CurvatureGRPOTrainer, CurvatureGRPOConfig)):
        lengths = set()

        def keep(module, args, output, lengths=lengths):
            if module.training and torch.is_grad_enabled():
                lengths.add(output.shape[1])
            return noisy(module, args, output)

        monkeypatch.setattr(neftune, "neftune_post_forward_hook", keep)
        config = config_class(
            output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=16, max_completion_length=8,
            max_steps=2, bf16=False, save_strategy="no", gradient_checkpointing=False, report_to="none",
            disable_tqdm=True, use_cpu=True, neftune_noise_alpha=5.0, seed=3,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = trainer_class(
            model=str(tiny_policy), reward_funcs=digits, args=config, train_dataset=prompts(32),
            processing_class=AutoTokenizer.from_pretrained(tiny_policy, padding_side="left"),
        )  # fmt: skip
        with caplog.at_level(logging.WARNING, logger="trl_ext"):
            trainer.train()
        results.append(lengths)
    theirs, ours = results
    assert ours and ours <= theirs
    assert len([one for one in caplog.records if "NEFTune's noise depends on the length of a row" in one.message]) == 1


def test_random_layers_are_named():
    plain = AutoModelForCausalLM.from_config(OPTConfig(**OPT, dropout=0.0))
    assert random_layers(plain) is None
    assert random_layers(AutoModelForCausalLM.from_config(OPTConfig(**OPT, dropout=0.0, layerdrop=0.1))) == "layerdrop"
    plain.model.decoder.layers[0].jitter_noise = 0.01  # as a mixture's router keeps it
    assert random_layers(plain) == "jitter_noise"
    plain.model.decoder.layers[0].jitter_noise = 0.0
    plain.model.decoder.layers[0].module_dropout = {"default": 0.2}  # as PEFT's LoKr keeps it
    assert random_layers(plain) == "module_dropout"


class OwnStep(CurvatureGRPOTrainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


def test_a_step_of_ones_own_is_warned_of_with_its_cost(tiny_policy, tmp_path, caplog):
    trainer = build(tiny_policy, tmp_path, trainer_class=OwnStep)
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        trainer.train()
    (said,) = [one for one in caplog.records if "OwnStep has a training_step of its own" in one.message
               and "Prompts aren't shared" not in one.message]  # fmt: skip
    assert said.levelname == "WARNING" and "2 to 5 times as long" in said.message


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    share=st.booleans(), skip=st.booleans(), dead=st.sampled_from([0.0, 0.5, 1.0]),
    beta=st.sampled_from([0.0, 0.05]), multiple_of=st.sampled_from([None, 8]), every=st.sampled_from([0, 1]),
    accumulation=st.sampled_from([1, 4]),
)  # fmt: skip
def test_shares_of_work_are_shares(share, skip, dead, beta, multiple_of, every, accumulation, tiny_policy, tmp_path):
    trainer = build(
        tiny_policy, tmp_path, reward_with_dead(dead), max_steps=1, share_prompts=share,
        skip_zero_advantage=skip, beta=beta, pad_to_multiple_of=multiple_of, interference_every=every,
        per_device_train_batch_size=16 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer.train()
    (entry,) = [log for log in trainer.state.log_history if "compute/micro_batches" in log]
    for name, value in entry.items():
        if name.startswith("compute/") and name.endswith("_frac"):
            assert 0 <= value <= 1, (name, value)
