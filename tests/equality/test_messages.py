"""What is wrong with a run is named before its first step, or as soon as it is known."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from harness import FOUR, build, messages, prompts, train
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from trl_ext.advantages.reward_checks import RewardFailures, RewardRaised, checked_reward
from trl_ext.console import ConsoleCallback, advice
from trl_ext.run_checks import warn_about_engine

NOWHERE = "no-model-here"


def asked(*texts):
    return Dataset.from_dict({"prompt": list(texts)})


POWER = {"normalization": "power"}
RESAMPLED = {**FOUR, "resample_zero_variance": True}
ONE_ROW = (
    r"train_dataset has 1 rows, and a generation takes 2 different prompts \(generation_batch_size=8 / "
    r"num_generations=4\): no step would be trained"
)
NO_PROMPT = "train_dataset has no column 'prompt', only 'question', 'answer': rename one, as in dataset.rename_column"
NOT_A_PROMPT = "train_dataset: the prompt of row 0 is 1, neither a text nor a list of messages"
NO_COLUMN = Dataset.from_dict({"question": ["a"] * 8, "answer": ["b"] * 8})
WRONG_DATA = [
    (NO_COLUMN, NO_PROMPT),
    (asked([{"role": "user", "content": "a"}], []), r"the prompt of row 1 is empty \(\[\]\)"),
    (asked("a").select([]), "train_dataset has 0 rows, and a generation takes 2 different"),
    (asked("1+1="), ONE_ROW),
    (asked(1, 2), NOT_A_PROMPT),
]
WRONG_OPTIONS = [
    (
        {"normalization": "std", "scale_rewards": "batch"},
        "='std' contradicts scale_rewards='batch', which is 'batch_std'",
    ),
    ({"normalization": "loo", "scale_rewards": "none"}, "normalization='loo' contradicts scale_rewards='none'"),
    ({"use_liger_kernel": True}, "use_liger_kernel=True needs a GPU, and this run has none"),
    ({"use_liger_kernel": True, "config_class": GRPOConfig}, "use_liger_kernel=True needs a GPU"),
    ({"checkpoint_layers": 1}, "checkpoint_layers=1 contradicts gradient_checkpointing=False"),
    ({"tokens_per_micro_batch": 100, "share_prompts": False}, "micro_batch=100 contradicts share_prompts=False"),
    ({"normalization": "gpo"}, "unknown normalization 'gpo': choose from none, mean, batch_mean, loo, std"),
    ({**POWER, "normalization_kwargs": {"alpha": -0.1}}, r"alpha=-0.1 must be a number in \[0, 1\]"),
    (POWER, "needs the option 'alpha'"),
    ({"normalization_kwargs": {"alpha": 0.5}}, "'std' has no option 'alpha'"),
    ({"normalization": "running_std", "normalization_kwargs": {"decay": 2}}, r"decay=2 must be a number in \[0, 1\)"),
    ({"normalization": len}, r"normalization len can't be called with \(rewards_PG, context\)"),
    (
        {"normalization": lambda r, c, eps: r, "normalization_kwargs": {"eps": 1}},
        "eps is for the named methods, not for a function",
    ),
    ({"scale_rewards": "prompt"}, "scale_rewards='prompt' must be one of"),
    ({"scale_rewards": "prompt", "config_class": GRPOConfig}, "scale_rewards='prompt' must be one of"),
    ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation='sum' must be"),
    ({"per_device_train_batch_size": 6}, r"\(6\) must be divisible by num_generations \(4\)"),
    ({"resample_max_rounds": 2}, "resample_max_rounds=2 contradicts resample_zero_variance=False"),
    ({"resample_live_prompts": 2}, "resample_live_prompts=2 contradicts resample_zero_variance=False"),
    ({"resample_live_prompts": 5, **RESAMPLED}, "resample_live_prompts=5 must be between 1 and 4"),
    ({"normalization": "global", **RESAMPLED}, "contradicts normalization='global'"),
    ({"what_if": ["maen"]}, "unknown normalization 'maen'.*Did you mean 'mean'"),
    ({"normalization": "adaptive"}, "'adaptive' was removed: .* use 'std', or 'max_rl' for hard prompts"),
    ({"what_if": ["curvature"]}, "'curvature' needs a state from earlier steps"),
]


WRONG_HELD_OUT = [
    ({"eval_dataset": NO_COLUMN}, "eval_dataset has no column 'prompt'"),
    ({"eval_dataset": {"sums": NO_COLUMN}}, r"eval_dataset\['sums'\] has no column 'prompt'"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [*(({"train_dataset": one}, message) for one, message in WRONG_DATA), *WRONG_HELD_OUT, *WRONG_OPTIONS],
)
def test_before_a_model_is_loaded(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match=message):
        build(tmp_path / NOWHERE, tmp_path, **{"train_dataset": prompts(32), **options})


def test_what_agrees_is_let_pass(tiny_policy, tmp_path):
    """The same method twice, and a stream, of which neither length nor rows are known."""
    build(tiny_policy, tmp_path, normalization="batch_std", scale_rewards="batch")
    stream = IterableDataset.from_generator(lambda: ({"prompt": f"{i} + 1 ="} for i in range(64)))
    build(tiny_policy, tmp_path, train_dataset=stream, accelerator_config={"dispatch_batches": False})


def test_liger_without_a_gpu_breaks_nothing(tiny_policy, tmp_path):
    with pytest.raises(ValueError, match="needs a GPU"):
        build(tiny_policy, tmp_path, use_liger_kernel=True)
    assert train(tiny_policy, tmp_path).state.global_step == 2


def test_prompts_longer_than_the_context(tiny_policy, tmp_path, caplog):
    """The built-in architecture has 512 positions."""
    short, beyond = asked("1 + 1 =", "2 + 2 ="), asked("1 + 1 =", "2 + 2 =", "1 + 1 = " * 200, "3")
    said = []
    for dataset, longest in ((beyond, 8), (short, 508), (short, 200)):  # TRL trains on all, as rotary positions go on
        caplog.clear()
        build(tiny_policy, tmp_path, train_dataset=dataset, max_completion_length=longest)
        said.append(caplog.text)
    assert "The prompt of row 2 of train_dataset has" in said[0] and "no room for an answer" in said[0]
    assert "an answer may go beyond it (max_completion_length=508; 2 such prompts" in said[1]
    assert "context" not in said[2]


@pytest.mark.parametrize("by", ["the model", "the environment"])
def test_tensor_parallelism_is_refused(by, tiny_policy, tmp_path, monkeypatch):
    """It would be summed over processes like parts of the batch."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    if by == "the model":
        model._tp_size = 2  # as transformers' own loading leaves it
    else:
        monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    with pytest.raises(ValueError, match=r"tensor parallelism \(tp_size=2\) isn't supported: .* Use FSDP2 or Deep"):
        build(tiny_policy, tmp_path, model=model)


def test_restarts_with_the_store_of_those_that_are_gone(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    args = SimpleNamespace(fsdp=None)
    two = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU)
    said = []
    warn_about_engine(args, two, said.append)
    assert len(said) == 1 and "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun" in said[0]
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    warn_about_engine(args, two, said.append)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert len(said) == 1
    warn_about_engine(args, two, said.append)
    assert "FSDP is requested, but MULTI_CPU runs" in said[1]


def test_rewards_that_are_all_missing_are_said_once(tiny_policy, tmp_path, caplog):
    def unscored(completions, **kwargs):
        return [None, float("nan")] * (len(completions) // 2)

    train(tiny_policy, tmp_path, unscored, max_steps=3)
    assert len(messages(caplog, "No completion of a batch was scored: 'unscored' returned None or NaN")) == 1
    assert len(messages(caplog, "All reward functions returned None")) == 1, "TRL's own, with its dump"


# ---- reward functions that fail


def test_failures_wait_for_the_other_processes():
    """Of two: rewards are made up in place of the function's, and the error is the next thing that all do."""
    failures = RewardFailures(2)

    def failing(completions, **kwargs):
        raise KeyError("boom")

    rewards = checked_reward(failing, failures=failures)(prompts=["question"] * 4, completions=["answer"] * 4)
    assert all(value != value for value in rewards) and len(rewards) == 4
    with pytest.raises(RewardRaised, match="process 1: reward function 'failing' raised KeyError: 'boom'"):
        failures.raise_on_all_ranks(process_index=1)
    failures.raise_on_all_ranks(process_index=1)  # told once


# ---- the example's console


def test_what_to_change_where_nothing_can_be_learned(capsys):
    callback = ConsoleCallback()
    args, state = GRPOConfig("x", max_completion_length=64, report_to="none", bf16=False), type("", (), {})()
    state.is_world_process_zero, state.max_steps = True, 5
    dead = {"normalization/zero_variance_frac": 1.0}
    hopeless = {"reward": 0.0, "accuracy": 0.0, "completions/clipped_ratio": 1.0, **dead}
    fine = {"reward": 0.5, "accuracy": 0.5, "completions/clipped_ratio": 0.9, **dead}
    for step, logs in enumerate([hopeless, fine, hopeless, hopeless, hopeless]):
        state.global_step = step
        callback.on_log(args, state, None, logs=logs)
    said = capsys.readouterr().out
    assert said.count("In 2 logged steps in a row every answer was truncated at max_completion_length=64") == 1
    assert said.count("In 2 logged steps in a row every answer was wrong") == 1
    assert "Raise max_completion_length" in said and "num_generations" in said
    assert advice(fine, 64) == {} == advice({**hopeless, "normalization/zero_variance_frac": 0.9}, 64)
