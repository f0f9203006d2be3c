"""Runs the commands ``python -m trl_ext report RUN``, ``check RUN`` and ``what-if RUN``."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["what-if"]:
        from trl_ext.report.what_if_command import main
    else:
        from trl_ext.report.command import main
    main(sys.argv[2:] if sys.argv[1:2] == ["what-if"] else sys.argv[1:])
