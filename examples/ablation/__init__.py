"""Compares normalisations, each at its best learning rate: ``ablate.py``, and ``README.md`` with what it found."""
