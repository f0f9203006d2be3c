"""Which columns of padding a micro-batch may lose, how rows are chosen for micro-batches, and how work is counted."""

import pytest
import torch
from architectures import build as architecture
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY
from transformers import GPT2Config, LlamaConfig, MambaConfig, OPTConfig
from transformers.models.auto import AutoModelForCausalLM

from trl_ext.plan import padding
from trl_ext.plan.compute_counts import StepCounts, compute_metrics
from trl_ext.plan.padding import change_by_padding, columns_by_rule, trimmed_columns
from trl_ext.plan.random_layers import random_layers
from trl_ext.plan.rows import RowTable, Trimming, even_batches, read_rows
from trl_ext.plan.step_plan import PlanLimits, plan_step
from trl_ext.schema import Sequences, join

SMALL = {**TINY, "vocab_size": 50}
BY_LENGTH = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
MODELS = {
    "rotary": (LlamaConfig(**SMALL), (True, True)),
    "positions learned": (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50), (False, True)),
    "state": (MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50), (False, True)),
    "rotation by length": (LlamaConfig(**SMALL, rope_parameters=BY_LENGTH), (False, False)),
}


@pytest.mark.parametrize("name", MODELS)
def test_columns_are_trimmed_where_that_changes_nothing(name):
    """The rule agrees with the model's own forward, with padding and without."""
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
    """HunYuan has a norm after its rotation: without the rule, a forward pass still finds it out."""
    assert columns_by_rule(architecture("hunyuan_v1_dense")) == (False, True)
    monkeypatch.setattr(padding, "NORM_AFTER_ROTATION", ())
    logged = []
    for name, moves in (("hunyuan_v1_dense", True), ("llama", False)):
        model = architecture(name).train()
        model.lm_head.eval()
        assert columns_by_rule(model) == (True, True)
        moved = change_by_padding(model)
        assert moved > 1e-3 if moves else moved < 1e-6
        assert trimmed_columns(model, logged.append) == (not moves, True)
        assert model.model.training and not model.lm_head.training
    assert len(logged) == 1 and "Padding before prompts stays: the model's output depends on it" in logged[0]
    not_loaded = architecture("hunyuan_v1_dense").to("meta")
    assert trimmed_columns(not_loaded, logged.append) == (True, True)  # by rule
    monster = architecture("llama")
    monster.forward = lambda **kwargs: 1 / 0
    assert trimmed_columns(monster, logged.append) == (False, True) and "ZeroDivisionError" in logged[-1]


# ---- the parts


def table(wanted_B, length_B, loss_tokens_B=None):
    """Of rows without prompts; each has a token that counts, unless ``loss_tokens_B`` is 0 for it."""
    loss_tokens_B = torch.ones_like(length_B) if loss_tokens_B is None else loss_tokens_B
    return RowTable(
        0 * length_B, length_B, length_B, loss_tokens_B, torch.arange(len(length_B)), wanted_B, packable=True
    )


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=24), st.integers(1, 6))
def test_even_batches(rows, n_batches):
    wanted_B = torch.tensor([wanted for wanted, _ in rows])
    length_B = torch.tensor([length for _, length in rows])
    n_batches = min(n_batches, len(rows))
    batches = even_batches(table(wanted_B, length_B), n_batches)
    chosen = torch.cat(batches).tolist()
    assert len(batches) == n_batches and all(len(batch) > 0 for batch in batches)
    assert len(set(chosen)) == len(chosen) and set(wanted_B.nonzero().flatten().tolist()) <= set(chosen)
    assert len(chosen) == max(int(wanted_B.sum()), n_batches)
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    fillers = [row for row in chosen if not wanted_B[row]]
    left = [length_B[row] for row in range(len(rows)) if row not in chosen]
    assert not fillers or all(max(length_B[row] for row in fillers) <= length for length in left)
    empty_B = length_B % 3 == 0  # rows without a token that counts make up for others last of all
    with_empty = even_batches(table(wanted_B, length_B, (~empty_B).long()), n_batches)
    fillers = [row for row in torch.cat(with_empty).tolist() if not wanted_B[row]]
    assert not empty_B[fillers].any() or empty_B[~wanted_B].sum() + len(fillers) > (~wanted_B).sum()
    lengths = length_B[[row for row in chosen if wanted_B[row]]]
    assert (lengths[:-1] >= lengths[1:]).all()


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=2, max_size=8),
    st.data(),
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from([None, 2, 4]),
)
def test_select_removes_only_padding(lengths, data, trim, multiple_of):
    n, prompt_width, completion_width = len(lengths), 8, 8
    generator = torch.Generator().manual_seed(n)
    prompt_N1, completion_N1 = torch.tensor(lengths).split(1, dim=1)
    prompt_mask = (torch.arange(prompt_width) >= prompt_width - prompt_N1).long()
    completion_mask = (torch.arange(completion_width) < completion_N1).long()
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
    whole = Sequences(rows)
    got = Trimming(*trim, multiple_of).select(whole, index, read_rows(whole, torch.ones(n, dtype=torch.bool))).columns
    for side, trimmed in zip(("prompt", "completion"), trim, strict=True):
        width, kept = rows[f"{side}_mask"].shape[1], got[f"{side}_mask"].shape[1]
        cut = slice(width - kept, width) if side == "prompt" else slice(0, kept)
        for name in (f"{side}_ids", f"{side}_mask"):
            assert torch.equal(got[name], rows[name][index][:, cut])
            assert got[name].sum() == rows[name][index].sum()  # nothing but zeros is gone
        longest = max(1, int(rows[f"{side}_mask"][index].sum(1).max()))
        expected = longest if multiple_of is None else -(-longest // multiple_of) * multiple_of
        assert kept == (expected if trimmed else width)
    assert got["old_per_token_logps"].shape == got["completion_ids"].shape
    both = torch.cat([got["prompt_mask"], got["completion_mask"]], 1)
    assert got["token_type_ids"].shape == both.shape
    assert torch.equal(got["token_type_ids"] * both, torch.cat([got["prompt_ids"], got["completion_ids"]], 1))
    assert got["importance_sampling_ratio"].shape == (len(index), 1)
    assert got["names"] == [str(i) for i in index.tolist()] and got["num_items_in_batch"] == 3


def test_join_undoes_a_split():
    rows = {"a": torch.arange(12).view(6, 2), "names": list("abcdef"), "n": torch.tensor(2)}
    parts = [{"a": rows["a"][i : i + 2], "names": rows["names"][i : i + 2], "n": rows["n"]} for i in (0, 2, 4)]
    whole = join([Sequences(part) for part in parts]).columns
    assert torch.equal(whole["a"], rows["a"]) and whole["names"] == rows["names"] and whole["n"] == 2


def test_a_plan_runs_what_is_wanted_in_as_few_micro_batches_as_the_limits_allow():
    """Ten rows of two prompts, six of them wanted, four to a micro-batch."""
    wanted_B = torch.tensor([True, True, False, True, True, False, True, True, False, False])
    length_B = torch.tensor([9, 8, 7, 6, 5, 4, 3, 2, 1, 1])
    rows = table(wanted_B, length_B)
    plan = plan_step(rows, PlanLimits(rows=4))
    assert [batch.tolist() for batch in plan.batches] == [[0, 1, 3], [4, 6, 7]] and not plan.shared
    assert plan.left_out(rows).tolist() == (~wanted_B).tolist() and plan.positions(rows) == [0, 0]
    another = plan_step(rows, PlanLimits(rows=4), lambda number: max(number, 3))  # a rank that needs three
    assert [len(batch) for batch in another.batches] == [2, 2, 2]
    shared = plan_step(rows, PlanLimits(rows=4, share=True, tokens=100))
    assert shared.shared and len(shared.batches) == 1 and shared.positions(rows) == [33]
    too_many = plan_step(rows, PlanLimits(rows=4, most=2, share=True, tokens=1))
    assert not too_many.shared and "more than 2 micro-batches" in too_many.not_shared
    assert plan_step(table(wanted_B & False, length_B), PlanLimits(rows=4)).batches == ()


def test_compute_metrics_by_hand():
    counts = {"sequences": 16, "sequences_run": 6, "tokens": 200, "tokens_run": 80}
    found = compute_metrics(StepCounts(micro_batches=2, **counts, positions=320, positions_run=90))
    expected = {"sequences_skipped_frac": 10 / 16, "tokens_skipped_frac": 0.6, "tokens_run": 80, "micro_batches": 2}
    expected |= {"padding_removed_frac": 1 - 10 / 120, "flops_saved_frac": 1 - 90 / 320}
    assert found == pytest.approx({f"compute/{name}": value for name, value in expected.items()})
    assert compute_metrics(StepCounts(1, 4, 4, 20, 20, 20, 20))["compute/padding_removed_frac"] == 0


def test_random_layers_are_named():
    def model(dropout=0.0, layerdrop=0.0):
        config = OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=32, dropout=dropout, layerdrop=layerdrop)
        return AutoModelForCausalLM.from_config(config)

    assert random_layers(model(dropout=0.1)) and random_layers(model(layerdrop=0.1)) == "layerdrop"
    plain = model()
    assert random_layers(plain) is None
    layer = plain.model.decoder.layers[0]
    layer.jitter_noise = 0.01  # as a mixture's router keeps it
    assert random_layers(plain) == "jitter_noise"
    layer.jitter_noise = 0.0
    layer.module_dropout = {"default": 0.2}  # as PEFT's LoKr keeps it
    assert random_layers(plain) == "module_dropout"
