"""``python -m trl_ext report RUN``: looks at runs."""

import sys

from trl_ext.report.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
