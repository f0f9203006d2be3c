"""For GPUs that aren't here: kernels compiled ahead, and the time they should take."""
