"""`python -m stagerun`, the same command as `python -m runner` and the script `stagerun`."""

import sys

from runner.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
