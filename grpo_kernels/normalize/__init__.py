"""From a group's rewards to its advantages: methods, statistics of group and batch, in torch and in Triton."""
