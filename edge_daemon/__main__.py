"""``python -m edge_daemon`` is the command ``edge-llm``."""

import sys

from edge_daemon.cli import main

if __name__ == "__main__":
    sys.exit(main())
