"""The trainer on our head: what goes through it in one pass, what doesn't, and that both are TRL's loss."""

import logging
from contextlib import contextmanager

import pytest
import torch
from harness import (
    PLAIN,
    assert_same,
    assert_same_gradients,
    build,
    distance,
    first_batch,
    lora,
    messages,
    norm_of,
    reward_with_dead,
    separate_gradients,
    tool_rollout,
    train,
    train_both,
)
from peft import get_peft_model
from reference import head_logprobs
from tiny_models import HEADS, save_model
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from grpo_kernels import linear_logprob
from trl_ext import CurvatureGRPOTrainer
from trl_ext.head import forward, weights
from trl_ext.head.weights import gathered_head, head_adapter

OFF_POLICY = {"num_iterations": 2}
TWO = {"gradient_accumulation_steps": 2, "steps_per_generation": 2}


@pytest.fixture
def projected(monkeypatch):
    """Tokens given to the head: one list for the loss in one pass, one for log-probs."""
    seen = {"loss": [], "logprob": []}

    def spy(name, function):
        def called(hidden, *args, **kwargs):
            seen[name].append(len(hidden))
            return function(hidden, *args, **kwargs)

        return called

    monkeypatch.setattr(forward, "linear_grpo_loss", spy("loss", forward.linear_grpo_loss))
    monkeypatch.setattr(forward, "linear_logprob", spy("logprob", forward.linear_logprob))
    return seen


def own(name):
    """A subclass that overrides this method, and changes nothing."""

    def method(self, *arguments, **named):
        return getattr(CurvatureGRPOTrainer, name)(self, *arguments, **named)

    return type("Own", (CurvatureGRPOTrainer,), {name: method})


SEQUENCES = {"importance_sampling_level": "sequence"}
KL = "every sequence runs: beta=0.05"
# options -> why the loss isn't made in one pass, or None; and why every sequence runs, if that is another reason
CASES = {
    "plain": ({}, None),
    "all rows": ({"skip_zero_advantage": False}, None, "skip_zero_advantage=False"),
    "its own loss": ({"ours": own("_compute_loss")}, None, "Own overrides _compute_loss"),
    "its own inputs": ({"ours": own("_prepare_inputs")}, None, "Own overrides _prepare_inputs"),
    "its own step": ({"ours": own("training_step")}, None, "Own overrides training_step"),
    "sequence level on policy": (SEQUENCES, None),
    "sequence level off policy": ({**SEQUENCES, **OFF_POLICY}, "'sequence' off policy"),
    "sequence level, KL": ({**SEQUENCES, "beta": 0.05, "use_bias_correction_kl": True}, "with KL times the ratio"),
    "entropy quantile": ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5"),
    "off-policy mask": ({"off_policy_mask_threshold": 0.5, **OFF_POLICY}, "off_policy_mask_threshold=0.5"),
    "vespo": ({"loss_type": "vespo"}, "loss_type='vespo'"),
    "adaptive entropy": ({"use_adaptive_entropy": True, "entropy_target": 3.0}, "use_adaptive_entropy"),
    "entropy bonus": ({"entropy_coef": 0.05, **TWO}, None, "the entropy bonus averages over a micro-batch"),
    "dual clip": ({"delta": 1.05, "epsilon": 0.01, "epsilon_high": 0.02, "learning_rate": 0.2, **OFF_POLICY}, None),
    "plain KL": ({"beta": 0.05, "use_bias_correction_kl": False, **OFF_POLICY}, None, KL),
    "KL times the ratio": ({"beta": 0.05, "use_bias_correction_kl": True, **OFF_POLICY}, None, KL),
    "truncated completions masked": ({"mask_truncated_completions": True}, None),
    "float32 head": ({"cast_lm_head_to_fp32": True}, None),
    "temperature": ({"temperature": 0.7}, None),
    "what only TRL computes with": ({"epsilon": 3.0, **OFF_POLICY}, "epsilon=3.0 must be in [0, 1]"),
    "checkpointed activations": ({"gradient_checkpointing": True}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_one_pass_or_trl_on_our_head(name, projected, tiny_policy, tmp_path, caplog):
    """The gradient is TRL's, and the log says once which loss is made and which sequences run."""
    options, obstacle, *runs = CASES[name]
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        _, theirs = train_both(tiny_policy, tmp_path, **{**PLAIN, **options})
    assert sum(log["grad_norm"] > 0 for log in theirs.recorder.logs if "grad_norm" in log) >= 2
    said = messages(caplog, "isn't made in one pass")
    if obstacle is None:
        assert not said and projected["loss"]
    else:
        assert len(said) == 1 and obstacle in said[0]
        assert not projected["loss"] and projected["logprob"]
    (why,) = runs or [obstacle or "sequences of advantage 0 don't run"]
    assert_logged_once(caplog, why, skipped=not runs and obstacle is None, asked=why != "skip_zero_advantage=False")
    assert bool(messages(caplog, "2 to 5 times as long")) is ("ours" in options)


def assert_logged_once(caplog, why, *, skipped, asked):
    """Why which sequences run: a warning where they should be skipped and aren't."""
    others = ("in one pass", "Prompts aren't shared")
    (said,) = [one for one in caplog.records if why in one.message and not any(o in one.message for o in others)]
    assert ("in TRL's own micro-batches" in said.message) is (not skipped and why != KL)
    assert said.levelname == ("WARNING" if asked and not skipped else "INFO")


def test_trls_own_head(projected, tiny_policy, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        train(tiny_policy, tmp_path, fused_loss=False)
    assert_logged_once(caplog, "fused_loss=False", skipped=False, asked=True)
    assert not projected["loss"] and not projected["logprob"]


@pytest.mark.parametrize("name", HEADS)
def test_other_heads(name, projected, tiny_policy, tmp_path, caplog):
    """Softcaps, logit scales, and the load-balancing loss of a mixture of experts, which isn't dropped."""
    folder, experts = save_model(HEADS[name], tiny_policy, tmp_path / "model"), name == "mixture of experts"
    for loss_type in ("grpo", "vespo"):
        ours, _ = train_both(
            folder, tmp_path / loss_type, reward_with_dead(0.5), **{**PLAIN, **TWO, "loss_type": loss_type}
        )
        assert not experts or all(log["aux_loss"] > 0 for log in ours.recorder.logs if "grad_norm" in log)
    assert len(messages(caplog, "Every sequence runs", "auxiliary loss")) == experts
    assert projected["loss"] and projected["logprob"]


class TRLsLoss(CurvatureGRPOTrainer):
    """A subclass with a loss of its own, which knows nothing of our masks and goes through our head's log-probs."""

    def _compute_loss(self, model, inputs):
        return GRPOTrainer._compute_loss(self, model, inputs)


@pytest.mark.parametrize(
    ("options", "ours_class"),
    [
        ({}, CurvatureGRPOTrainer),
        ({"top_entropy_quantile": 0.5}, CurvatureGRPOTrainer),
        ({"beta": 0.05, "num_iterations": 2}, CurvatureGRPOTrainer),
        ({}, TRLsLoss),
    ],
    ids=["one pass", "TRL's loss on our head", "off policy", "a subclass's loss"],
)
def test_the_loss_in_one_pass_projects_no_token_of_a_tool(options, ours_class, projected, tiny_policy, tmp_path):
    options = {"learning_rate": 0.05, "generation_kwargs": None, "rollout_func": tool_rollout, **options}
    theirs = train(tiny_policy, tmp_path, trainer_class=GRPOTrainer, **options)
    ours = build(tiny_policy, tmp_path, trainer_class=ours_class, **options)
    for counts in projected.values():  # of the tokens that asked the model whether it may share prompts
        counts.clear()
    ours.train()
    assert_same(ours, theirs)
    live = sum(sum(row) for row in tool_rollout([None] * 8, ours)["env_mask"])
    in_one_pass = ours_class is CurvatureGRPOTrainer and "top_entropy_quantile" not in options
    assert set(projected["loss"]) == ({live} if in_one_pass else set())
    assert projected["loss"] or projected["logprob"]


def test_an_adapter_on_the_head_is_used_and_trained(tiny_policy, tmp_path):
    """TRL refuses one; ours gives the log-probs of PEFT's own forward, and its gradients are autograd's."""
    trainer = train(tiny_policy, tmp_path, peft_config=lora(target_modules=["lm_head", "q_proj"]))
    trained = [p for name, p in trainer.model.named_parameters() if "lm_head" in name and "lora_B" in name]
    assert len(trained) == 1 and trained[0].abs().sum() > 0

    ids = torch.randint(4, 100, (2, 9))
    trainer.model.eval()
    with torch.no_grad():
        ours, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 5)
        logits = trainer.model(input_ids=ids).logits / trainer.temperature
    expected = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours, expected[:, 3:], rtol=1e-4, atol=1e-4)

    dora = lora(target_modules=["lm_head"], use_dora=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy), dora)
    head = model.get_output_embeddings()
    with pytest.raises(ValueError, match=r"adapter 'default' on the LM head is a .* only plain LoRA"):
        head_adapter(head, torch.zeros(1, head.get_base_layer().weight.shape[1]))
    head.get_base_layer().weight.requires_grad_(False)
    with model.disable_adapter(), gathered_head(head, torch.zeros(1, 8), keep=False) as (_, _, low_rank):
        assert low_rank is None


def test_bf16_autocast(tiny_policy, tmp_path):
    """Gradients stay close to TRL's in bf16, whose head rounds more than ours, and so does what is logged."""
    options = {**PLAIN, "skip_zero_advantage": False, "bf16": True, "max_steps": 1, "max_grad_norm": 0.0}
    ours, theirs = (
        train(tiny_policy, tmp_path / one.__name__, trainer_class=one, **options).recorder
        for one in (CurvatureGRPOTrainer, GRPOTrainer)
    )
    assert 0 < distance(ours.gradients[0], theirs.gradients[0]) <= 0.05 * norm_of(theirs.gradients[0])
    for name, tolerance in (("grad_norm", {"rel": 0.02}), ("entropy", {"rel": 0.01}), ("loss", {"abs": 1e-3})):
        assert ours.logs[0][name] == pytest.approx(theirs.logs[0][name], **tolerance)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_vllms_importance_correction(per_token, loss_type, projected, tiny_policy, tmp_path):
    """What vLLM would add to the batch, made up: the same loss and gradient as TRL's lines give on it."""
    trainer = build(tiny_policy, tmp_path, loss_type=loss_type, beta=0.05, max_steps=1)
    inputs = first_batch(trainer)
    torch.manual_seed(1)
    shape = inputs["completion_mask"].shape if per_token else (len(inputs["completion_mask"]), 1)
    inputs["importance_sampling_ratio"] = torch.rand(shape) + 0.5
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    projected["loss"].clear()
    losses = [trainer._compute_loss(trainer.model, inputs), GRPOTrainer._compute_loss(trainer, trainer.model, inputs)]
    assert len(projected["loss"]) == 1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    ours, theirs = separate_gradients(trainer.model, losses)
    assert norm_of(theirs) > 0
    assert_same_gradients([ours], [theirs])


def test_metrics_wait_for_the_device_once(tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, beta=0.05, entropy_coef=0.01, max_steps=1)
    inputs = first_batch(trainer)
    calls = []
    for name in ("gather", "reduce", "gather_for_metrics"):
        function = getattr(trainer.accelerator, name)

        def counted(*args, name=name, function=function, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        setattr(trainer.accelerator, name, counted)
    trainer._compute_loss(trainer.model, inputs)
    assert calls == ["gather"]
    calls.clear()
    GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    assert len(calls) > 5


def test_a_compiled_backbone(tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, max_steps=1)
    inputs = first_batch(trainer)

    def gradient():
        return list(separate_gradients(trainer.model, [trainer._compute_loss(trainer.model, inputs)]))

    expected = gradient()
    trainer.model.model.compile(backend="eager")
    torch.testing.assert_close(gradient(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_weight_that_is_there_in_the_forward_only(frozen, monkeypatch):
    """As under ZeRO-3, of which only this is imitated: parts are gathered for a while, and gone in the backward."""
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=False)
    whole = head.weight.detach().clone()
    head.weight.requires_grad_(not frozen)
    head.weight.ds_id = 0

    @contextmanager
    def gathered(*parameters):
        head.weight.data = whole.clone()
        yield
        head.weight.data.fill_(float("nan"))

    monkeypatch.setattr(weights, "gathered_by_zero3", gathered)
    head.weight.data.fill_(float("nan"))
    hidden, targets = torch.randn(5, 6, requires_grad=True), torch.randint(11, (5,))
    cotangent = torch.randn(5)
    with gathered_head(head, hidden, keep=True) as (weight, _, _):
        logprobs = linear_logprob(hidden, weight, targets)
    got = torch.autograd.grad(logprobs @ cotangent, [hidden] if frozen else [hidden, head.weight])
    whole.requires_grad_()
    expected = torch.autograd.grad(head_logprobs(hidden, whole, targets)[0] @ cotangent, [hidden, whole])
    torch.testing.assert_close(got, expected[: len(got)])
