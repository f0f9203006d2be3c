"""What the prompts' gradients do in a step, measured on the way, logged and kept in a file."""
