"""Turns the output of reward functions into advantages: checks, prompt keys, resampling, normalisation, its state."""
