"""Records per-sequence gradients of logged steps, measures how the prompts interfere, and stores the result."""
