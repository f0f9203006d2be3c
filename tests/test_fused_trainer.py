"""The trainer on our head: what goes through it in one pass, what doesn't, and that both are TRL's loss."""

import logging

import pytest
import torch
from peft import LoraConfig
from test_trainer_equality import PLAIN, Recorder, assert_same, digits, prompts, run
from transformers import AutoTokenizer, CohereConfig, Gemma2Config, GraniteConfig, MixtralConfig
from transformers.models.auto import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl_ext.loss import fused_head

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.head.forward import head_adapter

OFF_POLICY = {"num_iterations": 2}


@pytest.fixture
def projected(monkeypatch):
    """Tokens given to the head: one list for the loss in one pass, one for log-probs."""
    seen = {"loss": [], "logprob": []}

    def spy(name, function):
        def called(hidden, *args, **kwargs):
            seen[name].append(len(hidden))
            return function(hidden, *args, **kwargs)

        return called

    monkeypatch.setattr(fused_head, "linear_grpo_loss", spy("loss", fused_head.linear_grpo_loss))
    monkeypatch.setattr(fused_head, "linear_logprob", spy("logprob", fused_head.linear_logprob))
    return seen


CASES = {
    "sequence level on policy": ({"importance_sampling_level": "sequence"}, None),
    "sequence level off policy": ({"importance_sampling_level": "sequence", **OFF_POLICY}, "'sequence' off policy"),
    "sequence level, KL": (
        {"importance_sampling_level": "sequence", "beta": 0.05, "use_bias_correction_kl": True},
        "with KL times the ratio",
    ),
    "entropy quantile": ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5"),
    "off-policy mask": ({"off_policy_mask_threshold": 0.5, **OFF_POLICY}, "off_policy_mask_threshold=0.5"),
    "vespo": ({"loss_type": "vespo"}, "loss_type='vespo'"),
    "adaptive entropy": ({"use_adaptive_entropy": True, "entropy_target": 3.0}, "use_adaptive_entropy"),
    "entropy bonus": ({"entropy_coef": 0.05, "gradient_accumulation_steps": 2}, None),
    "dual clip": ({"delta": 1.05, "epsilon": 0.01, "epsilon_high": 0.02, "learning_rate": 0.2, **OFF_POLICY}, None),
    "plain KL": ({"beta": 0.05, "use_bias_correction_kl": False, **OFF_POLICY}, None),
    "KL times the ratio": ({"beta": 0.05, "use_bias_correction_kl": True, **OFF_POLICY}, None),
    "truncated completions masked": ({"mask_truncated_completions": True}, None),
    "float32 head": ({"cast_lm_head_to_fp32": True}, None),
    "temperature": ({"temperature": 0.7}, None),
    "what only TRL computes with": ({"epsilon": 3.0, **OFF_POLICY}, "epsilon=3.0 must be in [0, 1]"),
    "checkpointed activations": ({"gradient_checkpointing": True}, None),
}


def both(policy, folder, *, setting=None, **options):
    """TRL's run and ours with these options, the latter's wins where ``setting`` names them too."""
    names = {"loss_type", "beta", "num_iterations"}
    setting = {**PLAIN, "fused_loss": True, **(setting or {}), **{n: v for n, v in options.items() if n in names}}
    if "gradient_accumulation_steps" in options:
        setting["accumulation"] = (options["gradient_accumulation_steps"],) * 2
    extra = {n: v for n, v in options.items() if n not in {*names, "gradient_accumulation_steps"}}
    theirs = run(GRPOTrainer, GRPOConfig, policy, folder / "trl", setting, **extra)
    ours = run(CurvatureGRPOTrainer, CurvatureGRPOConfig, policy, folder / "ours", setting, **extra)
    assert_same(ours, theirs)
    assert sum(log["grad_norm"] > 0 for log in theirs[1].logs if "grad_norm" in log) >= 2
    return ours, theirs


@pytest.mark.parametrize("name", CASES)
def test_one_pass_or_trl_on_our_head(name, projected, tiny_policy, tmp_path, caplog):
    options, obstacle = CASES[name]
    with caplog.at_level(logging.INFO, logger="trl_ext.trainer"):
        both(tiny_policy, tmp_path, **options)
    said = [record.message for record in caplog.records if "isn't made in one pass" in record.message]
    if obstacle is None:
        assert not said and len(projected["loss"]) > 0
    else:
        assert len(said) == 1 and obstacle in said[0]
        assert not projected["loss"] and len(projected["logprob"]) > 0


def test_a_subclass_keeps_its_own_loss(projected, tiny_policy, tmp_path):
    class Own(CurvatureGRPOTrainer):
        def _compute_loss(self, model, inputs):
            return 2 * GRPOTrainer._compute_loss(self, model, inputs)

    setting = {**PLAIN, "fused_loss": True}
    own = run(Own, CurvatureGRPOConfig, tiny_policy, tmp_path / "own", setting, max_grad_norm=0.0)
    theirs = run(GRPOTrainer, GRPOConfig, tiny_policy, tmp_path / "trl", setting, max_grad_norm=0.0)
    assert not projected["loss"] and projected["logprob"]
    for name, gradient in theirs[1].gradients[0].items():
        torch.testing.assert_close(own[1].gradients[0][name], 2 * gradient, rtol=1e-4, atol=1e-6)


def test_a_subclass_with_advantages_of_its_own_is_heard(tiny_policy, tmp_path):
    class Flipped(CurvatureGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["advantages"] = -output["advantages"]
            return output

    class FlippedInTheLoss(CurvatureGRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, {**inputs, "advantages": -inputs["advantages"]})

    class Masked(CurvatureGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["completion_mask"][:, 3:] = 0
            return output

    class MaskedTRL(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["completion_mask"][:, 3:] = 0
            return output

    class PerToken(CurvatureGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["advantages"] = output["advantages"][:, None].expand(output["completion_ids"].shape)
            return output

    def gradients(trainer_class, name):
        config = CurvatureGRPOConfig if issubclass(trainer_class, CurvatureGRPOTrainer) else GRPOConfig
        setting = {**PLAIN, "fused_loss": True}
        return run(trainer_class, config, tiny_policy, tmp_path / name, setting, max_grad_norm=0.0)[1].gradients[0]

    ours, masked = gradients(CurvatureGRPOTrainer, "ours"), gradients(MaskedTRL, "masked TRL")
    for trainer_class, expected in ((Flipped, -1), (FlippedInTheLoss, -1), (PerToken, 1), (Masked, None)):
        got = gradients(trainer_class, trainer_class.__name__)
        for name, gradient in ours.items():
            wanted = masked[name] if expected is None else expected * gradient
            torch.testing.assert_close(got[name], wanted, rtol=1e-4, atol=1e-6)


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip
ARCHITECTURES = {
    "softcap": Gemma2Config(**TINY, head_dim=16, final_logit_softcapping=2.0, tie_word_embeddings=True),
    "logit scale": CohereConfig(**TINY, logit_scale=0.25),
    "divided logits": GraniteConfig(**TINY, logits_scaling=3.0),
    "mixture of experts": MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_heads(name, projected, tiny_policy, tmp_path):
    """Softcaps, logit scales, and the load-balancing loss of a mixture of experts, which isn't dropped."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    config = ARCHITECTURES[name]
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for loss_type in ("grpo", "vespo"):
        (_, record, _), _ = both(folder, tmp_path / loss_type, loss_type=loss_type, gradient_accumulation_steps=2)
        if name == "mixture of experts":
            assert all(log["aux_loss"] > 0 for log in record.logs if "grad_norm" in log)
    assert projected["loss"] and projected["logprob"]


def tool_rollout(prompts, trainer):
    """Completions in which three tokens, elsewhere in each row, came from a tool."""
    generator = torch.Generator().manual_seed(7 * trainer.state.global_step)
    tokenizer = trainer.processing_class
    completions = [
        torch.randint(4, len(tokenizer), (n % 5 + 3,), generator=generator).tolist() for n in range(len(prompts))
    ]
    return {
        "prompt_ids": [tokenizer.encode("<user>What is 1 + 1?<assistant>") for _ in prompts],
        "completion_ids": completions,
        "logprobs": None,
        "env_mask": [[0 if 0 <= t - n % 4 <= 2 else 1 for t in range(len(row))] for n, row in enumerate(completions)],
    }


class TRLsLoss(CurvatureGRPOTrainer):
    """A subclass with a loss of its own, which knows nothing of our masks."""

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
def test_tool_tokens_are_never_projected(options, ours_class, projected, tiny_policy, tmp_path):
    results = []
    for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (ours_class, CurvatureGRPOConfig)):
        config = config_class(
            output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=8, max_completion_length=8,
            max_steps=2, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", logging_steps=1, bf16=False,
            save_strategy="no", gradient_checkpointing=False, report_to="none", disable_tqdm=True, use_cpu=True,
            **options,
        )  # fmt: skip
        recorder = Recorder()
        trainer = trainer_class(
            model=str(tiny_policy),
            reward_funcs=digits,
            args=config,
            train_dataset=prompts(32),
            processing_class=AutoTokenizer.from_pretrained(tiny_policy, padding_side="left"),
            rollout_func=tool_rollout,
            callbacks=[recorder],
        )
        for counts in projected.values():  # of the tokens by which the model was asked whether it may share prompts
            counts.clear()
        trainer.train()
        results.append((trainer, recorder, {n: p.detach() for n, p in trainer.model.named_parameters()}))
    assert_same(results[1], results[0])
    if ours_class is TRLsLoss:  # nobody told our head which tokens a tool made
        return
    live = sum(sum(row) for row in tool_rollout([None] * 8, results[1][0])["env_mask"])
    assert set(projected["loss"] + projected["logprob"]) == {live}


def test_an_adapter_on_the_head_is_used_and_trained(tiny_policy, tmp_path):
    """TRL refuses one; ours gives the log-probs of the merged model, and its gradients are autograd's."""
    from peft import get_peft_model

    from trl_ext.head.forward import gathered_head

    config = CurvatureGRPOConfig(
        output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=8, max_completion_length=8,
        max_steps=3, learning_rate=0.05, optim="sgd", bf16=False, save_strategy="no", gradient_checkpointing=False,
        report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    trainer = CurvatureGRPOTrainer(
        model=str(tiny_policy), reward_funcs=digits, args=config, train_dataset=prompts(32),
        processing_class=AutoTokenizer.from_pretrained(tiny_policy, padding_side="left"),
        peft_config=LoraConfig(r=3, target_modules=["lm_head", "q_proj"], lora_dropout=0.0),
    )  # fmt: skip
    trainer.train()
    trained = [p for name, p in trainer.model.named_parameters() if "lm_head" in name and "lora_B" in name]
    assert len(trained) == 1 and trained[0].abs().sum() > 0

    ids = torch.randint(4, 100, (2, 9))
    trainer.model.eval()
    with torch.no_grad():
        ours, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 5)
        logits = trainer.model.merge_and_unload()(input_ids=ids).logits / trainer.temperature
    expected = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours, expected[:, 3:], rtol=1e-4, atol=1e-4)

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_policy), LoraConfig(r=2, target_modules=["lm_head"], use_dora=True)
    )
    head = model.get_output_embeddings()
    with pytest.raises(ValueError, match=r"adapter 'default' on the LM head is a .* only plain LoRA"):
        head_adapter(head, torch.zeros(1, head.get_base_layer().weight.shape[1]))
    head.get_base_layer().weight.requires_grad_(False)
    with model.disable_adapter(), gathered_head(head, torch.zeros(1, 8), keep=False) as (_, _, low_rank):
        assert low_rank is None


def test_bf16_autocast(tiny_policy, tmp_path):
    """Gradients stay close to TRL's in bf16, whose head rounds more than ours, and so does what is logged."""
    setting = {**PLAIN, "fused_loss": True, "skip_zero_advantage": False}
    options = {"bf16": True, "steps": 1, "max_grad_norm": 0.0}
    ours = run(CurvatureGRPOTrainer, CurvatureGRPOConfig, tiny_policy, tmp_path / "a", setting, **options)
    theirs = run(GRPOTrainer, GRPOConfig, tiny_policy, tmp_path / "b", setting, **options)
    norm = sum(g.square().sum() for g in theirs[1].gradients[0].values()).sqrt()
    error = sum((ours[1].gradients[0][n] - g).square().sum() for n, g in theirs[1].gradients[0].items()).sqrt()
    assert 0 < error <= 0.05 * norm
    assert ours[1].logs[0]["grad_norm"] == pytest.approx(theirs[1].logs[0]["grad_norm"], rel=0.02)
    assert ours[1].logs[0]["entropy"] == pytest.approx(theirs[1].logs[0]["entropy"], rel=0.01)
    assert ours[1].logs[0]["loss"] == pytest.approx(theirs[1].logs[0]["loss"], abs=1e-3)


def build(policy, folder, **options):
    config = CurvatureGRPOConfig(
        output_dir=str(folder), num_generations=4, per_device_train_batch_size=8, max_completion_length=8, max_steps=1,
        optim="sgd", learning_rate=0.02, logging_steps=1, save_strategy="no", bf16=False, gradient_checkpointing=False,
        generation_kwargs={"sequence_bias": [[[1], 5.0]]}, report_to="none", disable_tqdm=True, use_cpu=True, seed=7,
        **options,
    )  # fmt: skip
    return CurvatureGRPOTrainer(
        model=str(policy), reward_funcs=digits, args=config, train_dataset=prompts(32),
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
    )  # fmt: skip


def first_batch(trainer):
    """The first micro-batch the loss is given."""
    kept = []
    compute = trainer._compute_loss

    def keep(model, inputs):
        kept.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = keep
    trainer.train()
    del trainer._compute_loss
    return kept[0]


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_vllms_importance_correction(per_token, loss_type, projected, tiny_policy, tmp_path):
    """What vLLM would add to the batch, made up: the same loss and gradient as TRL's lines give on it."""
    trainer = build(tiny_policy, tmp_path, loss_type=loss_type, beta=0.05)
    inputs = first_batch(trainer)
    torch.manual_seed(1)
    shape = inputs["completion_mask"].shape if per_token else (len(inputs["completion_mask"]), 1)
    inputs["importance_sampling_ratio"] = torch.rand(shape) + 0.5
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    projected["loss"].clear()
    losses = [trainer._compute_loss(trainer.model, inputs), GRPOTrainer._compute_loss(trainer, trainer.model, inputs)]
    assert len(projected["loss"]) == 1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    parameters = list(trainer.model.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in losses)
    norm = sum(g.square().sum() for g in theirs).sqrt()
    assert norm > 0 and sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True)).sqrt() <= 1e-5 * norm


def test_metrics_wait_for_the_device_once(tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, beta=0.05, entropy_coef=0.01)
    inputs = first_batch(trainer)
    calls = []
    for name in ("gather", "reduce", "gather_for_metrics"):
        function = getattr(trainer.accelerator, name)
        setattr(
            trainer.accelerator,
            name,
            lambda *a, name=name, function=function, **k: calls.append(name) or function(*a, **k),
        )
    trainer._compute_loss(trainer.model, inputs)
    assert calls == ["gather"]
    calls.clear()
    GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    assert len(calls) > 5


def test_a_compiled_backbone(tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path)
    inputs = first_batch(trainer)
    expected = torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), list(trainer.model.parameters()))
    trainer.model.model.compile(backend="eager")
    got = torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), list(trainer.model.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_weight_that_is_there_in_the_forward_only(frozen, monkeypatch):
    """As under ZeRO-3, of which only this is imitated: parts are gathered for a while, and gone in the backward."""
    from contextlib import contextmanager

    from reference import head_logprobs

    from grpo_kernels import linear_logprob

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

    monkeypatch.setattr(fused_head, "maybe_gather_lm_head_ctx", gathered)
    head.weight.data.fill_(float("nan"))
    hidden, targets = torch.randn(5, 6, requires_grad=True), torch.randint(11, (5,))
    cotangent = torch.randn(5)
    with fused_head.gathered_head(head, hidden, keep=True) as (weight, _, _):
        logprobs = linear_logprob(hidden, weight, targets)
    inputs = [hidden] if frozen else [hidden, head.weight]
    got = torch.autograd.grad(logprobs @ cotangent, inputs)
    whole.requires_grad_()
    expected = torch.autograd.grad(head_logprobs(hidden, whole, targets)[0] @ cotangent, [hidden, whole][: len(inputs)])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
