"""From TRL's generation batch to the micro-batches of an optimizer step, which hold only what has a gradient."""
