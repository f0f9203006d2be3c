"""The loss of a micro-batch: in one pass over the head, or TRL's own."""
