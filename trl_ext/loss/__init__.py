"""From a micro-batch to its loss: token weights, the model's fused head, the loss in one pass."""
