"""Runs each prompt once for all its completions: layout of the packed row, attention, hooks."""
