"""A prompt that runs once: its layout, attention in parts and by masks against rows of their own in float64, models
that may and that may not, and TRL's trainer (test_trainer_equality.py has it among its options)."""

import pytest
import torch
from harness import PLAIN, build, distance, lora, norm_of, parameters, train
from kernel_inputs import ANSWERS, LONGEST, PROMPT_OF, PROMPTS, WIDTH, shared_rows
from peft import get_peft_model
from tiny_models import TINY
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from trl_ext.plan import probe_sharing
from trl_ext.plan.rows import RowTable, read_rows
from trl_ext.plan.shared_batches import packed_positions, shared_batches, split_into
from trl_ext.schema import Sequences
from trl_ext.sharing import attention, flash
from trl_ext.sharing.hooks import add_sharing_hooks
from trl_ext.sharing.packed_rows import Spans, pack

SIZES = {**TINY, "vocab_size": 97, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SIZES |= {"max_position_embeddings": 256, "head_dim": 8}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3, windows": Gemma3TextConfig(**SIZES, **WINDOWS),
    "llama, eager": LlamaConfig(**SIZES, attn_implementation="eager"),
}


def test_the_layout():
    ids, mask = shared_rows()
    rows = pack(ids, mask, WIDTH)
    assert len(rows.token_S) == sum(PROMPTS) + sum(ANSWERS)
    packed = ids.flatten()[rows.token_S]
    positions = rows.inputs(ids)["position_ids"][0]
    for row, (prompt, length) in enumerate(zip(PROMPT_OF, ANSWERS, strict=True)):
        first = WIDTH - PROMPTS[prompt]
        place = rows.packed_BC[row]
        assert (place[:first] == -1).all() and (place[WIDTH + length :] == -1).all()
        assert torch.equal(packed[place[first : WIDTH + length]], ids[row, first : WIDTH + length])
        assert positions[place[first : WIDTH + length]].tolist() == list(range(PROMPTS[prompt] + length))
    own, to_prompts = rows.spans()
    of_prompts, of_answers = own.query_lengths[:3], own.query_lengths[3:]
    prompt = [rows.row_P.tolist().index(PROMPT_OF.index(p)) for p in range(3)]  # packed in the order of their tokens
    assert [of_prompts[i] for i in prompt] == PROMPTS and own.key_lengths == own.query_lengths and own.causal
    assert [to_prompts.query_lengths[i] for i in prompt] == [9 + 3 + 4, 1 + 5 + 9, 2]
    assert to_prompts.key_lengths == of_prompts and not to_prompts.causal
    assert sorted(of_answers) == sorted(ANSWERS)
    starts = torch.tensor(of_answers).cumsum(0) - torch.tensor(of_answers)
    first = [int(rows.packed_BC[row, WIDTH]) for row in range(len(ANSWERS))]
    assert sorted(first) == (starts + sum(PROMPTS)).tolist()
    assert to_prompts.queries == slice(sum(PROMPTS), len(rows.token_S)) and to_prompts.keys == slice(0, sum(PROMPTS))
    assert own.queries == own.keys == slice(0, len(rows.token_S))


def test_short_spans_run_together():
    """On a CPU; a span of no token nowhere."""
    spans = Spans(slice(0, 103), slice(0, 103), [50, 2, 0, 48, 3], [50, 2, 0, 48, 3], causal=True)
    short = flash._short(spans, torch.device("cpu"))
    assert flash._separate(spans) == [(slice(0, 50), slice(0, 50))]
    position = torch.arange(103.0)[None, None, :, None]
    together = short.unpack(position)[:, 0, :, 0]
    assert together.shape == (4, 48) and together[short.is_token[:, 0]].tolist() == list(range(50, 103))
    assert together[0].tolist() == [50, 51, *[0] * 46]
    assert torch.equal(short.pack(short.unpack(position), 103)[:, :, 50:], position[:, :, 50:])
    seen = Spans(slice(0, 5), slice(0, 9), [5, 0], [3, 6], causal=False)
    assert flash._short(seen, torch.device("cpu")) is None and flash._separate(seen) == [(slice(0, 5), slice(0, 3))]


@pytest.mark.parametrize("columns", [WIDTH + 1, slice(None, WIDTH)], ids=["gap", "no prompt"])
def test_rows_that_can_not_be_packed(columns):
    ids, mask = shared_rows()
    mask[0, columns] = 0
    with pytest.raises(ValueError, match="rows with gaps, or without a prompt"):
        pack(ids, mask, WIDTH)


@pytest.mark.parametrize(
    ("rows", "columns", "width", "message"),
    [
        (2, 5, 2, r"must both be \(B, C\) with a row or more, got \(2, 4\) and \(2, 5\)"),
        (0, 4, 2, r"got \(0, 4\) and \(0, 4\)"),
        (2, 4, 0, r"width=0 must be in \[1, 4\]"),
        (2, 4, 5, r"width=5 must be in \[1, 4\]"),
    ],
)
def test_what_can_not_be_rows(rows, columns, width, message):
    with pytest.raises(ValueError, match=message):
        pack(torch.zeros((rows, 4), dtype=torch.long), torch.ones(rows, columns), width)


def gradients(model, hidden, live):
    """Of a number that weighs every answer's token differently."""
    weights = torch.randn(live.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (hidden.sin().sum(-1) * weights[live]).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", MODELS)
def test_hidden_states_and_gradients(kind, adapted, checkpointing):
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(MODELS[kind])
    if adapted:
        whole = get_peft_model(whole, lora(init_lora_weights=False))
        whole.enable_input_require_grads()
    whole = whole.double().train()
    if checkpointing is not None:
        whole.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    base = whole.get_base_model() if adapted else whole
    add_sharing_hooks(base)
    ids, mask = shared_rows()
    live = mask[:, 1:].bool()
    live[:, : WIDTH - 1] = False
    # eager attention of a row of padding is NaN in float64: a mask of its own, where padding sees itself
    causal = torch.ones(WIDTH + LONGEST, WIDTH + LONGEST).tril().bool()
    seen = causal & mask.bool()[:, None, :] | torch.eye(WIDTH + LONGEST).bool()
    given = mask if "eager" not in kind else torch.where(seen, 0.0, -torch.inf).double()[:, None]
    places = (torch.arange(WIDTH + LONGEST) - (WIDTH - torch.tensor(PROMPTS)[PROMPT_OF])[:, None]).clamp(min=0)
    own = base.model(input_ids=ids, attention_mask=given, position_ids=places, use_cache=False).last_hidden_state
    own = own[:, :-1][live]
    want = gradients(whole, own, live)
    rows = pack(ids, mask, WIDTH)
    packed = base.model(**rows.inputs(ids), use_cache=False).last_hidden_state[0]
    shared = packed[rows.packed_BC[:, :-1][live]]
    torch.testing.assert_close(shared, own, rtol=1e-5, atol=2e-6)  # norms are float32's
    got = gradients(whole, shared, live)
    assert got.keys() == want.keys() and len(got) > 10
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    assert base.config._attn_implementation == ("eager" if "eager" in kind else "sdpa")


@pytest.mark.parametrize("short", [0, 5, 48])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_parts_and_by_masks(dtype, short, monkeypatch):
    monkeypatch.setattr(flash, "SHORT", short)
    ids, mask = shared_rows()
    rows = pack(ids, mask, WIDTH)
    torch.manual_seed(0)
    made = [torch.randn(1, 4, len(rows.token_S), 8, dtype=torch.float64) for _ in range(4)]

    def both(dtype, by_masks):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in made[:3])
        if by_masks:
            out = attention.by_masks(q, k, v, rows, 0.3, None)
        else:
            out = attention.InParts.apply(q, k, v, rows.spans(), 0.3).transpose(1, 2)
        (out * made[3].to(dtype).transpose(1, 2)).sum().backward()
        return out, q.grad, k.grad, v.grad

    truth = both(torch.float64, True)
    for got, want in zip(both(dtype, False), truth, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


def test_in_parts_against_finite_differences():
    ids, mask = shared_rows()
    rows = pack(ids[:3], mask[:3], WIDTH)
    torch.manual_seed(0)
    made = [torch.randn(1, 2, len(rows.token_S), 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.autograd.gradcheck(lambda q, k, v: attention.InParts.apply(q, k, v, rows.spans(), 0.5), made)


# ---- micro-batches


def test_whole_groups_within_a_budget():
    wanted = torch.tensor([True] * 6 + [False] * 2)
    prompt_of = torch.tensor([0, 1, 0, 1, 2, 0, 2, 1])
    prompt_B, answer_B = torch.tensor([10, 20, 10, 20, 5, 10, 5, 20]), torch.tensor([7, 5, 8, 6, 3, 9, 100, 100])
    table = RowTable(prompt_B, answer_B, answer_B, answer_B, prompt_of, wanted, packable=True)
    together = shared_batches(table, budget=1000)
    assert [sorted(rows) for rows in together] == [[0, 1, 2, 3, 4, 5]]
    # costs: 10 + 24 + 3 * 1.5, 20 + 11 + 2 * 3, 5 + 3 + 0.75
    apart = shared_batches(table, budget=50)
    assert [sorted(rows) for rows in apart] == [[0, 2, 4, 5], [1, 3]]
    split = shared_batches(table, budget=30)
    assert sorted(row for rows in split for row in rows) == [0, 1, 2, 3, 4, 5] and len(split) == 4
    assert packed_positions(torch.tensor([0, 2, 4]), table) == 10 + 7 + 8 + 5 + 3


def test_batches_that_can_not_share():
    ids, mask = shared_rows()
    rows = {"prompt_id": torch.tensor(PROMPT_OF), "prompt_mask": mask[:, :WIDTH], "completion_mask": mask[:, WIDTH:]}

    def can(rows):
        return read_rows(Sequences(rows), torch.ones(len(ids), dtype=torch.bool)).packable

    assert can(rows)
    assert not can({name: value for name, value in rows.items() if name != "prompt_id"})
    assert not can({**rows, "token_type_ids": ids})
    for name, place in (("prompt_mask", (1, 3)), ("prompt_mask", (0, WIDTH - 1)), ("completion_mask", (0, 4))):
        gap = rows[name].clone()
        gap[place] = 0
        assert not can({**rows, name: gap}), (name, place)
    empty = rows["completion_mask"].clone()
    empty[0] = 0
    assert can({**rows, "completion_mask": empty})


def test_as_many_as_another_process():
    wanted, lengths = torch.tensor([True, True, True, False]), torch.tensor([9, 8, 7, 3])
    table = RowTable(lengths * 0, lengths, lengths, lengths, torch.arange(4), wanted, packable=True)
    assert [rows.tolist() for rows in split_into([[0, 1, 2]], 1, table)] == [[0, 1, 2]]
    two = split_into([[0, 1, 2]], 2, table)
    assert sorted(row for rows in two for row in rows.tolist()) == [0, 1, 2]
    four = split_into([[0, 1, 2]], 4, table)
    assert [len(rows) for rows in four] == [1] * 4  # a dead one makes up


# ---- the trainer


@pytest.mark.parametrize(
    ("options", "why", "level"),
    [
        ({}, "Answers to one prompt run in one row, the prompt once (in steps that log", "INFO"),
        ({"fused_loss": False}, "Prompts aren't shared: every sequence runs in TRL's own micro-batches.", "INFO"),
        ({"skip_zero_advantage": False}, "Prompts aren't shared: every sequence runs in TRL's own", "INFO"),
        ({"moved": 1.0}, "Prompts aren't shared: the model's output changes (relative change 1.0e+00", "WARNING"),
        ({"share_prompts": False}, None, None),
    ],
)
def test_it_says_whether_it_shares(options, why, level, tiny_policy, tmp_path, caplog, monkeypatch):
    moved = options.pop("moved", None)
    if moved is not None:
        monkeypatch.setattr(probe_sharing, "change_by_sharing", lambda _: moved)
    with caplog.at_level("INFO"):
        train(tiny_policy, tmp_path, **options)
    said = [record for record in caplog.records if "shared" in record.message or "in one row" in record.message]
    assert [record.levelname for record in said] == ([] if why is None else [level])
    assert why is None or why in said[0].message


def test_mixed_precision_on_a_cpu(tiny_policy, tmp_path):
    """Under autocast a rotation leaves float32 queries beside values in bfloat16."""
    options = {**PLAIN, "gradient_accumulation_steps": 2, "max_steps": 1, "bf16": True, "interference_every": 0}
    alone, shared = (
        train(tiny_policy, tmp_path / str(share), **{**options, "share_prompts": share}).recorder.gradients[0]
        for share in (False, True)
    )
    assert distance(shared, alone) < 2e-2 * norm_of(alone)


def test_dropout_in_attention(tiny_policy, tmp_path, monkeypatch):
    """Shares it, by masks, and drops what it would drop."""
    dropped, by_masks = [], attention.by_masks
    monkeypatch.setattr(attention, "by_masks", lambda *given: dropped.append(given[-1]) or by_masks(*given))
    trainer = build(tiny_policy, tmp_path, interference_every=0)
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer.train()
    assert trainer.state.global_step == 2
    assert dropped and set(dropped) == {0.5}


def test_logging_changes_no_more_than_rounding(tiny_policy, tmp_path):
    """Steps that log run in rows of their own."""
    alone, logged = (
        parameters(train(tiny_policy, tmp_path, interference_every=every, max_steps=1, learning_rate=0.1).model)
        for every in (0, 1)
    )
    assert 0 < distance(logged, alone) < 1e-6 * norm_of(alone)


def test_more_micro_batches_than_trl_calls_for(tiny_policy, tmp_path, caplog):
    """A budget of a token a micro-batch: it runs unshared, and says so."""
    trainer = train(tiny_policy, tmp_path, share_prompts=True, tokens_per_micro_batch=1, interference_every=0)
    assert trainer.state.global_step == 2
    assert "Prompts aren't shared where that takes more than 1 micro-batches" in caplog.text
