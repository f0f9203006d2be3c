"""Plans the micro-batches of an optimizer step from TRL's generation batch: only sequences with a gradient run."""
