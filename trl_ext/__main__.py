"""Runs ``python -m trl_ext report RUN``, ``check RUN``, ``compare A B``, ``what-if RUN`` and ``ablate SCRIPT``."""

import sys

if __name__ == "__main__":
    name, *rest = sys.argv[1:] or [""]
    if name == "what-if":
        from trl_ext.report.what_if_command import main
    elif name == "compare":
        from trl_ext.report.compare_command import main
    elif name == "ablate":
        from trl_ext.ablate.command import main
    else:
        from trl_ext.report.command import main

        rest = sys.argv[1:]
    main(rest)
