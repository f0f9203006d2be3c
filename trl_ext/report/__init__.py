"""One page of a run, or of several side by side: ``python -m trl_ext report``."""
