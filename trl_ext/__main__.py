"""``python -m trl_ext report RUN`` and ``python -m trl_ext what-if RUN``: looks at runs."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["what-if"]:
        from trl_ext.report.what_if_command import main

        main(sys.argv[2:])
    else:
        from trl_ext.report.command import main

        main(sys.argv[1:])
