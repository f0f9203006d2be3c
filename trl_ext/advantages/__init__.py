"""From reward functions to advantages: checks, keys of prompts, resampling, normalisation and its state."""
