"""The fixtures of ``tests/conftest.py``, for the experiments' tests."""

from conftest import mixed_policy, tiny_policy  # noqa: F401
