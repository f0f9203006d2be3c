"""How the gradients of a step's prompts interfere: sketches of gradients, inner products, metrics."""

from .gradient_recorder import GradientRecorder, RecordedGradients

__all__ = ["GradientRecorder", "RecordedGradients"]
