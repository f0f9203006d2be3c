"""Patches the model's forward so that our LM head returns log-probs or the loss instead of logits."""
