"""Measures how the prompts' gradients of an optimizer step interfere: sketches, inner products, metrics."""

from .gradient_recorder import GradientRecorder, RecordedGradients

__all__ = ["GradientRecorder", "RecordedGradients"]
