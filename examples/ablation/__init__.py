"""Compares normalisations, each at its best learning rate: ``train.py``, and ``README.md`` with what it found."""
