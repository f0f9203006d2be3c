"""The model's forward up to log-probs or the loss, through our LM head."""
