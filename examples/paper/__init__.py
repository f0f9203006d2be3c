"""Measures the claims of arXiv 2601.23135 again: ``README.md`` has the commands and what they found."""
