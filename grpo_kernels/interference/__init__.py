"""Measures how the prompts' gradients of an optimizer step interfere: sketches, inner products, metrics."""
