"""Turns a group's rewards into advantages: methods, and statistics of group and batch, in torch and in Triton."""
