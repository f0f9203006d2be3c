"""Records the per-sequence gradients of logged steps in any training loop, measures them, and stores the result."""
