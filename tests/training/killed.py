"""The program the tests kill: `python -m tests.training.killed RUN_DIR [--resume] [--steps N] ...`, see `tiny.main`."""

from __future__ import annotations

import sys

from bestiary.quick_imports import quick_imports

with quick_imports():
    from tests.training.tiny import main

if __name__ == "__main__":
    sys.exit(main())
