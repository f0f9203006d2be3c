"""Whatever raises in what looks at a run, wherever: training goes on as without it, and the log says so once."""

import logging

import pytest
import torch
from harness import messages
from harness import train as train_tiny

# every place at which the trainer, the loss, the head or a hook enters the code that measures interference
PLACES = [
    "grpo_kernels.interference.gradient_sketch.GradientSketch.__init__",
    "grpo_kernels.interference.gradient_sketch.GradientSketch.matches",
    "grpo_kernels.interference.gradient_sketch.GradientSketch.open",
    "grpo_kernels.interference.gradient_sketch.GradientSketch.set_rows",
    "grpo_kernels.interference.gradient_sketch.GradientSketch.end_rows",
    "grpo_kernels.interference.gradient_sketch.GradientSketch.head_sketch",
    "grpo_kernels.interference.gradient_sketch.GradientSketch.exclude_mismatches",
    "grpo_kernels.interference.gradient_sketch.GradientSketch.take",
    "grpo_kernels.interference.projections.Projections._add_folded",
    "grpo_kernels.interference.layer_sums.LayerSums._note_precision",
    "grpo_kernels.interference.layer_sums.LayerSums._linear",
    "grpo_kernels.interference.layer_sums.LayerSums._norm",
    "grpo_kernels.interference.layer_sums.LayerSums._embedding",
    "grpo_kernels.interference.gradient_sketch.tap",
    "grpo_kernels.interference.projections.Projections.__init__",
    "grpo_kernels.interference.projections.Projections.vocabulary",
    "grpo_kernels.interference.projections.Projections.fold_side",
    "grpo_kernels.interference.sequence_rows.SequenceRows.outer",
    "grpo_kernels.interference.tap_check.TapCheck.outer",
    "grpo_kernels.interference.tap_check.TapCheck.errors",
    "grpo_kernels.head.checks._check_head_sketch",
    "trl_ext.recorder.measure.directional_curvature",
    "trl_ext.recorder.recorder.why_rows_mix",
    "trl_ext.recorder.recorder.PromptFeatures.__init__",
    "trl_ext.recorder.recorder.PromptFeatures.set_rows",
    "trl_ext.recorder.recorder.PromptFeatures._record",
    "trl_ext.recorder.recorder.PromptFeatures.end_rows",
    "trl_ext.recorder.recorder.PromptFeatures.take",
    "trl_ext.recorder.recorder.probe_layers",
    "trl_ext.recorder.layer_check.GradientShards.__getitem__",
    "trl_ext.recorder.sequence_table.SequenceTable.of_batch",
    "trl_ext.recorder.logged_step.sequence_coefficients",
    "trl_ext.recorder.sequence_table.SequenceTable.join",
    "trl_ext.recorder.sequence_table.SequenceTable.pack",
    "trl_ext.recorder.recorder.measure",
    "trl_ext.recorder.recorder.write_step",
    "trl_ext.recorder.layer_check.GradientShards.squared_norms",
    "trl_ext.recorder.recorder.check_shapes",
    "trl_ext.recorder.layer_check.LayerCheck.metrics",
    "trl_ext.recorder.recorder.InterferenceRecorder._open_taps",
    "trl_ext.recorder.recorder.TrainingPhase.observe",
    "trl_ext.recorder.recorder.SpeedupConstant.observe",
    "trl_ext.recorder.what_if.what_if",
    "trl_ext.recorder.extra_pass.ExtraPass.keep",
    "trl_ext.recorder.extra_pass.ExtraPass.run_passes",
    "trl_ext.components.prompt_texts",
    "trl_ext.components.TaskNames.of_prompts",
    "trl_ext.trainer.dead_sequences",
    "trl_ext.advantages.normalizer.Normalizer.observe_curvature",
    "trl_ext.advantages.normalizer.Normalizer.used",
    "trl_ext.report.completions.rows_of",
    "trl_ext.report.watch.diagnose",
    "trl_ext.components.describe_run",
]


def train(policy, folder, **options):
    trainer = train_tiny(policy, folder, gradient_accumulation_steps=2, share_prompts=False, **options)
    assert trainer.state.global_step == 2
    return list(trainer.model.parameters())


@pytest.fixture(scope="module")
def without(tiny_policy, tmp_path_factory):
    return train(tiny_policy, tmp_path_factory.mktemp("without"), interference_every=0)


CASES = [(place, RuntimeError) for place in PLACES] + [(place, MemoryError) for place in PLACES[::5]]


@pytest.mark.parametrize(("place", "kind"), CASES)
def test_training_goes_on(place, kind, without, tiny_policy, tmp_path, monkeypatch, caplog):

    def broken(*args, **kwargs):
        raise kind("the diagnostic is broken")

    monkeypatch.setattr(place, broken)
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        found = train(tiny_policy, tmp_path, interference_every=1, what_if_dead=True)
    assert all(torch.equal(a, b) for a, b in zip(found, without, strict=True))
    said = messages(caplog, "the diagnostic is broken")
    assert len(said) == len(set(said))
    assert said
