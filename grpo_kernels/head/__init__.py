"""From hidden states to log-probs, losses and gradients: the LM head in one pass over tiles of logits."""
