"""Scripts to start from, and the tasks that they share. Nothing here is installed.

Each script puts the repository's root on the module path, and imports ``examples.tasks`` from there. The folder
``examples/`` itself must never be on the path: its ``math.py`` would take the place of the standard library's.
"""
