"""grpo_kernels.interference.gradient_sketch on small real transformers: exact, and sketched without bias."""

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from grpo_kernels.interference import layer_batches, projections
from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.layer_sums import LayerSums
from grpo_kernels.interference.projections import REPLICATES, random_signs

WORDS, POSITIONS, ROWS = 97, 11, 6
MODELS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}  # Qwen3: norms of heads
SIZES = {"vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 112, "head_dim": 16}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def make_model(kind="llama", tie=True, lora=False, bias=True):
    torch.manual_seed(0)
    model_class, config_class = MODELS[kind]
    model = model_class(config_class(**SIZES, attention_bias=bias, tie_word_embeddings=tie))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return add_lora(model) if lora else model


def add_lora(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def batch():
    torch.manual_seed(1)
    ids = torch.randint(0, WORDS, (ROWS, POSITIONS))
    mask = torch.ones(ROWS, POSITIONS, dtype=torch.long)
    mask[0, :3] = mask[3, :5] = 0  # left padding
    return ids, mask


FIRST_SIGNS = [1, 1, -1, -1, 1, 1, -1, 1]
WEIGHTS = torch.tensor([1.0, -0.5, 0.25, 2.0, -1.0, 0.75])


def loss_of(model, ids, mask, weights):
    logp = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
    chosen = logp.gather(-1, ids[:, 1:, None])[..., 0] * (mask[:, 1:] * mask[:, :-1])
    return (chosen.sum(1) * weights).sum()


def gradient_rows(model, losses):
    """(losses, parameters) float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
    return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in gradients]).double()


def one_backward_each(model):
    alone = torch.where(torch.eye(ROWS, dtype=torch.bool), WEIGHTS, 0.0)
    return gradient_rows(model, (loss_of(model, *batch(), weights) for weights in alone))


def record(model, dim, seed=0, parts=((0, 4), (4, 6)), **arguments):
    sketch = GradientSketch(model, dim, **arguments)
    ids, mask = batch()
    with sketch.step(seed) as recorded:
        for start, stop in parts:
            chosen = slice(start, stop)
            with sketch.rows(torch.arange(ROWS)[chosen] // 2):
                loss_of(model, ids[chosen], mask[chosen], WEIGHTS[chosen]).backward()
    sketch.close()
    return recorded[0]


def record_loss(model, dim, loss, prompts, sequence_RT=None):
    """What is recorded of one backward of ``loss()``."""
    sketch = GradientSketch(model, dim)
    with sketch.step(3) as recorded, sketch.rows(torch.tensor(prompts), sequence_RT):
        loss().backward()
    sketch.close()
    return recorded[0]


def assert_gram(got, truth, tolerance=1e-5):
    gram = truth @ truth.T
    assert (got - gram).norm() <= tolerance * gram.norm()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_exact_is_one_backward_for_each_sequence(kind, tie, lora):
    model = make_model(kind, tie, lora)
    recorded = record(model, 0)
    assert_gram(recorded.gram(), one_backward_each(model))
    assert recorded.prompt_B.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = make_model()
    truth = one_backward_each(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_gram(record(model, 0).gram(), truth)


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
def test_checkpointing_still_lets_go_of_activations(checkpointing):
    """With open taps no input of a checkpointed layer is alive between forward and backward; without, they all are."""
    model = make_model().train()
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(weakref.ref(inputs[0])))
    sketch = GradientSketch(model, 8)
    with sketch.step(0), sketch.rows(torch.arange(ROWS)):
        loss = loss_of(model, *batch(), WEIGHTS)
        alive = [reference() is not None for reference in seen]
        assert alive == [checkpointing == "none"] * 2
        loss.backward()
    assert len(seen) == (2 if checkpointing == "none" else 4)  # computed again in the backward


def test_lora_over_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    make_model().save_pretrained(tmp_path)
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "device_map": "cpu"}
    model = add_lora(LlamaForCausalLM.from_pretrained(tmp_path, **options))
    assert "Linear4bit" in {type(module).__name__ for module in model.modules()}
    recorded = record(model, 0)
    assert_gram(recorded.gram(), one_backward_each(model), 1e-4)
    assert recorded.gram().trace() > 0


def test_packed_rows():
    """Two sequences in a row, kept apart by a block-diagonal mask, with the sequence of each position."""
    model = make_model()
    torch.manual_seed(2)
    ids = torch.randint(0, WORDS, (2, 12))
    sequence = torch.tensor([[0] * 5 + [1] * 7, [2] * 8 + [-1] * 4])
    allowed = (sequence[:, :, None] == sequence[:, None, :]) & torch.ones(12, 12, dtype=torch.bool).tril()
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]
    position = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
    same = (sequence[:, 1:] == sequence[:, :-1]) & (sequence[:, 1:] >= 0)

    def loss(weights_S):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position).logits[:, :-1]
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (logp * same * weights_S[sequence[:, 1:].clamp(min=0)]).sum()

    recorded = record_loss(model, 0, lambda: loss(torch.ones(3)), [7, 7, 9], sequence)
    assert_gram(recorded.gram(), gradient_rows(model, (loss(alone) for alone in torch.eye(3))))
    assert recorded.prompt_B.tolist() == [7, 7, 9]


@pytest.mark.parametrize("lora", [False, True])
def test_sketched_inner_products_are_unbiased(lora):
    """Over draws of the signs the mean of each inner product is the true one, within four standard errors."""
    model = make_model(lora=lora)
    truth = one_backward_each(model)
    gram = truth @ truth.T
    grams = torch.stack([record(model, 16, seed).gram() for seed in range(48)])
    standard_error = grams.std(0) / len(grams) ** 0.5
    assert ((grams.mean(0) - gram).abs() <= 4 * standard_error + 1e-9 * gram.abs().max()).all()


def test_the_sketch_adds_over_micro_batches_and_draws_differ():
    model = make_model()
    whole, parts = record(model, 8, parts=((0, 6),)), record(model, 8, parts=((0, 1), (1, 3), (3, 6)))
    torch.testing.assert_close(parts.sketch, whole.sketch, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(record(model, 8, seed=1).sketch, whole.sketch, atol=1e-2)
    torch.testing.assert_close(record(model, 8, parts=((0, 6),)).sketch, whole.sketch)


@pytest.mark.parametrize("lora", [False, True])
def test_taps_do_not_change_the_gradients(lora):
    """Gradients with taps are those without, bit for bit."""
    model = make_model(lora=lora)
    loss_of(model, *batch(), WEIGHTS).backward()
    plain = [p.grad for p in model.parameters() if p.requires_grad]
    for layers in (None, ["*q_proj*", "*norm"] if not lora else ["*lora_A*"]):
        model.zero_grad()
        record(model, 8, parts=((0, 6),), layers=layers)
        tapped = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(torch.equal(a, b) for a, b in zip(plain, tapped, strict=True))


def test_memory_does_not_grow_with_depth():
    """B k k numbers a step, 3 x 9 k k a sequence of the current micro-batch, and signs: one for each part and feature
    of a layer, and 18 k k for all."""
    sizes = []
    for layers in (2, 4):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": layers}))
        sketch = GradientSketch(model, 8)
        sketch.open(0)
        sketch.set_rows(torch.arange(ROWS))
        loss_of(model, *batch(), WEIGHTS).backward()
        sums = sketch._sums
        assert [tuple(x.shape) for x in sums.rows.entries.values()] == [(REPLICATES, ROWS, 24, 24)]
        sums.finish()
        assert not sums.rows.entries
        assert [tuple(x.shape) for x in sums.rows.total.values()] == [(ROWS, REPLICATES, 64 // REPLICATES)]
        sizes.append(sums.projection.numbers())
    features = REPLICATES * (2 * (4 * 64 + 2 * (64 + 32)) + 2 * 3 * (64 + 112) + 4 * 64)  # of two more layers
    assert sizes[1] - sizes[0] <= features


class Launches(TorchDispatchMode):
    """The operations that a GPU would start a kernel for, and those that would wait for it."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.names, self.waits = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [x for x in (args[1] if name in ("index", "index_put_") else ()) if x is not None]
        if any(word in name for word in self.WAITS) or any(x.dtype in (torch.bool, torch.uint8) for x in masks):
            self.waits.append(name)
        if not function.is_view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view", "promote")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_a_large_layer_takes_few_launches(monkeypatch):
    """(4096, 4096), several blocks a side: at most ten, folded as on a GPU."""
    monkeypatch.setattr(projections, "favours_few_launches", lambda device: True)
    layer = torch.nn.Linear(4096, 4096, bias=False)
    sketch = GradientSketch(torch.nn.Sequential(layer), 64)
    sketch._verified.add(0)  # the layer was checked before: seven steps of eight don't again
    d, a = torch.randn(2, 3, 4096), torch.randn(2, 3, 4096)
    with sketch.step(0) as recorded, sketch.rows(torch.arange(2)):
        tapped, sums = sketch.layers[0], sketch._sums
        sums.add(tapped, sums.rows, d, a)  # the entries are there
        sums._batches.flush()
        with Launches() as seen:
            sums.add(tapped, sums.rows, d, a)
            sums._batches.flush()
    assert len(seen.names) <= 10, seen.names
    assert not seen.waits
    want = 2 * torch.einsum("rtd,rta->rda", d, a).flatten(1)
    assert recorded[0].gram().diagonal() == pytest.approx(want.square().sum(1).numpy(), rel=0.1)


@pytest.mark.parametrize("width", [25, 47, 48, 49, 100, 192, 193])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_folding_add_the_same(width, dtype):
    """Entry i, signed, to (i + shift) mod 24: from one block and a bit to eight blocks and a bit."""
    torch.manual_seed(0)
    values, signs = torch.randn(5, width).to(dtype), torch.randint(0, 2, (2, 1, width)).float() * 2 - 1
    want = torch.zeros(2, 5, 24, dtype=torch.float64)
    want.index_add_(2, (torch.arange(width) + 7) % 24, values.double() * signs.double())
    halves, launches = torch.full((2, 2, 5, 24), torch.nan)
    projections._fold_by_halves(values, signs, 7, halves)
    projections._fold_in_few_launches([values], [signs], [7], launches[None])
    for got in (halves, launches):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dim", [8, 24])  # all sides are folded; narrow ones are not
def test_layers_together_and_one_by_one_have_the_same_sketch(dim, lora, packed, monkeypatch):
    """On a CPU's way and on a GPU's; a bound of 0 bytes processes each layer at once."""
    model = make_model(lora=lora)
    ids, mask = batch()
    sequence = torch.where(mask.bool(), torch.arange(ROWS)[:, None], -1) if packed else None

    def sketch(few_launches, bound):
        monkeypatch.setattr(projections, "favours_few_launches", lambda device: few_launches)
        monkeypatch.setitem(layer_batches.KEPT_BYTES, "cpu", bound)
        return record_loss(model, dim, lambda: loss_of(model, ids, mask, WEIGHTS), torch.arange(ROWS), sequence).sketch

    alone = sketch(False, 0)
    for few_launches, bound in ((False, 1 << 30), (True, 0), (True, 1 << 30), (True, 50_000)):
        assert (sketch(few_launches, bound) - alone).norm() <= 1e-6 * alone.norm()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_layer_more_costs_few_launches(lora, packed, monkeypatch):
    """Beyond the model's own, at most three for each tap of a shape that is there; alone, each takes ten to twenty."""
    monkeypatch.setattr(projections, "favours_few_launches", lambda device: True)
    ids, mask = batch()
    sequence = torch.where(mask.bool(), torch.arange(ROWS)[:, None], -1) if packed else None
    added, taps = [], []
    for layers in (2, 6):
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": layers}))
        model = add_lora(model) if lora else model
        sketch = GradientSketch(model, 8)
        monkeypatch.setattr(sketch, "_due", frozenset)  # no check is due
        with Launches() as plain:
            loss_of(model, ids, mask, WEIGHTS).backward()
        with Launches() as logged, sketch.step(0), sketch.rows(torch.arange(ROWS), sequence):
            loss_of(model, ids, mask, WEIGHTS).backward()
        added.append(len(logged.names) - len(plain.names))
        taps.append(len(sketch.layers))
    assert 0 < added[1] - added[0] <= 3 * (taps[1] - taps[0])


def test_kept_layers_stay_within_the_bound(monkeypatch):
    """What the taps keep between two layers' hooks, and the inputs that are alive then: two layers' at most here."""
    width, rows = 64, torch.arange(ROWS)
    size = ROWS * 4 * width * 4  # bytes of an input
    monkeypatch.setitem(layer_batches.KEPT_BYTES, "cpu", 4 * size)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(8)))
    sketch, kept = GradientSketch(model, 8), []
    process = LayerSums._process

    def seen(sums, group):
        kept.append(sum({x.data_ptr(): x.nbytes for one in group for x in (one.gradient, one.layer_input)}.values()))
        process(sums, group)

    monkeypatch.setattr(LayerSums, "_process", seen)
    with sketch.step(0), sketch.rows(rows):
        model(torch.randn(ROWS, 4, width)).square().sum().backward()
    assert len(kept) > 2 and max(kept) <= 4 * size + 2 * size


class OverwritingNorm(torch.autograd.Function):
    """As Liger's norms: the backward writes the input's gradient over the output's."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        weight_grad = (gradient * x).sum((0, 1))
        return gradient.mul_(weight).mul_(7), weight_grad


class ScaleNorm(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(width) + 1)

    def forward(self, x):
        return OverwritingNorm.apply(x, self.weight)


def test_a_norm_may_overwrite_its_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), ScaleNorm(5), torch.nn.Linear(5, 3), ScaleNorm(3))
    sketch = GradientSketch(model, 0)
    with sketch.step(0), sketch.rows(torch.arange(4)):
        (model(torch.randn(4, 7, 6)) * torch.randn(4, 7, 3)).sum().backward()
    assert sketch.exclude_mismatches([parameter.grad for parameter in sketch.trainable_parameters]) == {}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("packed", [False, True])
def test_taps_never_wait_for_the_device(kind, packed):
    model = make_model(kind)
    ids, mask = batch()
    sequence = torch.where(mask.bool(), torch.arange(ROWS)[:, None], -1) if packed else None
    sketch = GradientSketch(model, 8)
    with sketch.step(0), sketch.rows(torch.arange(ROWS), sequence):
        loss = loss_of(model, ids, mask, WEIGHTS)
        with Launches() as seen:
            loss.backward()
    assert "bmm" in seen.names or "baddbmm_" in seen.names
    assert not seen.waits


def test_packed_rows_of_any_lengths():
    """Padding dropped, the sketch of packed tokens is that of padded rows; lengths from 1 to many, and 0."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 24)
    lengths, width = [1, 30, 0, 2, 7], 30
    a = torch.zeros(len(lengths), width, 40)
    weight = torch.randn(24)
    sequence = torch.full((len(lengths), width), -1)
    for i, length in enumerate(lengths):
        a[i, :length] = torch.randn(length, 40)
        sequence[i, :length] = i
    order = torch.randperm(a.shape[0] * width)  # not even one after the other
    packed_a, packed_sequence = a.flatten(0, 1)[order][None], sequence.flatten()[order][None]

    def loss(values, sequence):
        return ((layer(values).tanh() @ weight) * (sequence >= 0)).sum()

    for dim in (0, 4, 64):
        whole = record_loss(layer, dim, lambda: loss(a, sequence), range(5))
        packed = record_loss(layer, dim, lambda: loss(packed_a, packed_sequence), range(5), packed_sequence)
        torch.testing.assert_close(packed.sketch, whole.sketch, rtol=1e-4, atol=1e-5)


def test_signs_depend_on_the_seed_alone():
    device = torch.device("cpu")
    signs = random_signs("7 x", 4_000_003, device)
    assert torch.equal(signs, random_signs("7 x", 4_000_003, device)) and set(signs.tolist()) == {-1, 1}
    other = random_signs("8 x", 4_000_003, device)
    for mean in (signs, signs * other, signs[1:] * signs[:-1], signs[32:] * signs[:-32], signs[64:] * signs[:-64]):
        assert abs(mean.double().mean()) < 5 / 2000  # five standard errors
    assert signs[:8].tolist() == FIRST_SIGNS  # also on other machines


def test_bad_input_is_named():
    model = make_model()
    with pytest.raises(ValueError, match="dim=-1 must be a whole number"):
        GradientSketch(model, -1)
    with pytest.raises(ValueError, match=r"'\*qproj' matches none of the layers model.embed_tokens, model.layers.0"):
        GradientSketch(model, 4, layers=["*qproj"])
    for wrong in ("*q_proj", [1], 5):
        with pytest.raises(ValueError, match="must be a list of patterns"):
            GradientSketch(model, 4, layers=wrong)
    with pytest.raises(ValueError, match="nothing to tap"):
        GradientSketch(model.requires_grad_(False), 4)
    model.requires_grad_(True)
    sketch = GradientSketch(model, 4)
    with pytest.raises(ValueError, match="needs an open step"), sketch.rows(torch.arange(ROWS)):
        pass
    with pytest.raises(ValueError, match="no step is open"):
        sketch.take()
    with pytest.raises(ValueError, match="this step recorded no rows"), sketch.step(0):
        pass
    wrong_length = pytest.raises(ValueError, match="prompt ids of the wrong length")
    with wrong_length, sketch.step(0), sketch.rows(torch.arange(5)):
        loss_of(model, *batch(), WEIGHTS).backward()
    for message, *rows in (
        ("prompt ids must be an integer tensor", torch.ones(6)),
        (r"sequence_RT must be an integer tensor \(R, T\), got \[0", torch.arange(2), [0, 1]),
        (r"values in \[-1, 2\)", torch.arange(2), torch.full((1, 4), 2)),
    ):
        with pytest.raises(ValueError, match=message), sketch.step(0):
            sketch.set_rows(*rows)
    with sketch.step(0):
        sketch.set_rows(torch.arange(ROWS))
        with pytest.raises(ValueError, match="a step is open already"):
            sketch.open(1)


def test_a_model_may_change_a_layers_output_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            y = self.first(x)
            y += x
            return self.second(y.tanh_())

    torch.manual_seed(0)
    model, x = InPlace(), torch.randn(2, 5, 6)
    model(x).sum().backward()
    plain = [p.grad for p in model.parameters()]
    model.zero_grad()
    recorded = record_loss(model, 0, lambda: model(x).sum(), [0, 1])
    assert all(torch.equal(p.grad, before) for p, before in zip(model.parameters(), plain, strict=True))
    assert recorded.gram().sum().item() == pytest.approx(sum(g.square().sum().item() for g in plain), rel=1e-5)
