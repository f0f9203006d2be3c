"""The command ``python -m trl_ext ablate``: trains a user's script with several values of an option, and compares."""
