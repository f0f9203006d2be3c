"""examples/ablation/train.py in ``python -m trl_ext ablate``: it takes the options, and trains as it does by itself."""

from pathlib import Path

import pytest
from processes import start

from trl_ext.ablate import run_script
from trl_ext.ablate.study import Result, Spec

SCRIPT = Path(__file__).with_name("train.py")
LENGTHS = "--max_steps 1 --eval_steps 1 --eval_size 4 --num_generations 4 --per_device_train_batch_size 16".split()


def trained(policy, folder, *arguments):
    options = {"normalization": "power", "normalization_kwargs": {"alpha": 0.5}, "learning_rate": 1e-3, "seed": 7}
    given = ["--model_name_or_path", str(policy), *LENGTHS, *arguments]
    spec = Spec(str(SCRIPT), given, {**options, "output_dir": str(folder)}, "train", str(folder / "result.json"))
    spec.write(folder / "spec.json")
    code = start(1, run_script.main, str(folder / "spec.json"), folder=folder / "out").finish()
    return code, Result.read(folder / "result.json")


@pytest.mark.parametrize("noise", [(), ("--reward_noise", "0.2")])
def test_the_ablation_sets_its_options(noise, tiny_policy, tmp_path):
    code, result = trained(tiny_policy, tmp_path, *noise)
    assert (code, result.status, result.ignored) == ([0], "finished", {}), result.error
    accuracies = [(entry["step"], entry["eval_accuracy"]) for entry in result.logs if "eval_accuracy" in entry]
    assert [step for step, _ in accuracies] == [0, 1]
    assert any(name.startswith("eval_tasks/") for entry in result.logs for name in entry)  # the mixture, by task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "gsm8k"], "--dataset 'gsm8k': choose from mixture, arithmetic"),
        (["--reward_noise", "0.5"], "--reward_noise 0.5 must be in [0, 0.5)"),
        (["--levles", "1"], "--levles: no such option, did you mean --levels?"),
    ],
)
def test_bad_input_is_named(arguments, message, tiny_policy, tmp_path):
    assert message in trained(tiny_policy, tmp_path, *arguments)[1].error
