"""From the gradients of one step's sequences to how prompts interfere: sketches, metrics, curvature, phases."""
