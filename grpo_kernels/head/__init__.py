"""Computes log-probs, losses and gradients from hidden states, with the LM head in one pass over tiles of logits."""
