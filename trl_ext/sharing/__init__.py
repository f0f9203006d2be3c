"""Answers to one prompt in one row, the prompt once: layout, attention, hooks."""
