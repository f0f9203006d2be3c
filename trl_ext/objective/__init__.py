"""Computes the loss of a micro-batch: in one pass over the head, or by TRL's own code."""
