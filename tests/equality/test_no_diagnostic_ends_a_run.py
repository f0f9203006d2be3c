"""Whatever raises in what looks at a run, wherever: training goes on as without it, and the log says so once."""

import logging

import pytest
import torch
from harness import messages, parameters
from harness import train as train_tiny

# every place at which the trainer, the loss, the head or a hook enters the code that measures interference
PLACES = [
    f"{module}.{name}"
    for module, names in {
        "grpo_kernels.interference.gradient_sketch.GradientSketch": (
            "__init__ matches open set_rows end_rows head_sketch exclude_mismatches take"
        ),
        "grpo_kernels.interference.gradient_sketch": "tap",
        "grpo_kernels.interference.projections.Projections": "__init__ vocabulary fold_side _add_folded",
        "grpo_kernels.interference.layer_sums.LayerSums": "_linears _norms _embedding _note_precision",
        "grpo_kernels.interference.sequence_rows.SequenceRows": "outer",
        "grpo_kernels.interference.tap_check.TapCheck": "outer errors",
        "grpo_kernels.head.checks": "_check_head_sketch",
        "trl_ext.recorder.recorder": "why_rows_mix probe_layers sequence_coefficients table_of_batch",
        "grpo_kernels.recorder.gradient_recorder": "measure check_shapes",
        "grpo_kernels.recorder.open_step": "write_step",
        "trl_ext.recorder.recorder.PromptFeatures": "__init__ set_rows _record end_rows take",
        "trl_ext.recorder.recorder.InterferenceRecorder": "_sketch_built _report",
        "grpo_kernels.recorder.run_statistics.TrainingPhase": "observe",
        "grpo_kernels.recorder.run_statistics.SpeedupConstant": "observe value",
        "grpo_kernels.recorder.run_statistics.PooledAlignment": "observe",
        "grpo_kernels.recorder.measure": "directional_curvature interference_metrics",
        "grpo_kernels.recorder.layer_check.GradientShards": "__getitem__ squared_norms",
        "grpo_kernels.recorder.layer_check.LayerCheck": "metrics",
        "grpo_kernels.recorder.sequence_table.SequenceTable": "join pack",
        "grpo_kernels.recorder.what_if_step": "what_if",
        "trl_ext.recorder.extra_pass.ExtraPass": "keep run_passes",
        "trl_ext.components": "prompt_texts describe_run TaskNames.of_prompts",
        "trl_ext.trainer": "dead_sequences",
        "trl_ext.advantages.normalizer.Normalizer": "observe_curvature used",
        "trl_ext.report.completions": "rows_of",
        "trl_ext.report.watch": "diagnose",
    }.items()
    for name in names.split()
]


ENDS = "Interference isn't logged from here on"
MESSAGES = {
    "grpo_kernels.interference.sequence_rows.SequenceRows.outer": "Error: the diagnostic is broken",
    "grpo_kernels.interference.gradient_sketch.GradientSketch.open": ENDS,
    "grpo_kernels.interference.gradient_sketch.GradientSketch.head_sketch": ENDS,
    "trl_ext.recorder.recorder.PromptFeatures._record": ENDS,
    "grpo_kernels.recorder.measure.interference_metrics": ENDS,
    "grpo_kernels.recorder.open_step.write_step": "without its files",
}


def train(policy, folder, **options):
    trainer = train_tiny(policy, folder, gradient_accumulation_steps=2, share_prompts=False, **options)
    return parameters(trainer.model)


@pytest.fixture(scope="module")
def without(tiny_policy, tmp_path_factory):
    """Parameters without a diagnostic, by whether activations are checkpointed."""
    folder = tmp_path_factory.mktemp("without")
    return {on: train(tiny_policy, folder, interference_every=0, gradient_checkpointing=on) for on in (False, True)}


CASES = [(place, RuntimeError, False) for place in PLACES]
CASES += [(place, MemoryError, False) for place in PLACES[::5]]
CASES += [(place, MemoryError, on) for place in MESSAGES for on in (False, True)]


@pytest.mark.parametrize(("place", "kind", "checkpointing"), dict.fromkeys(CASES))
def test_training_goes_on(place, kind, checkpointing, without, tiny_policy, tmp_path, monkeypatch, caplog):

    def broken(*args, **kwargs):
        raise kind("the diagnostic is broken")

    monkeypatch.setattr(place, broken)
    options = {"interference_every": 1, "what_if_dead": True, "gradient_checkpointing": checkpointing}
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        found = train(tiny_policy, tmp_path, **options)
    torch.testing.assert_close(found, without[checkpointing], rtol=0, atol=0)
    said = messages(caplog, "the diagnostic is broken")
    assert said and len(said) == len(set(said))
    assert any(MESSAGES.get(place, "") in text for text in said)
