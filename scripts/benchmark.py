"""This package's speed and memory beside the stock implementation's: ``python scripts/benchmark.py --help``.

The parts are in ``benchmarking/``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log; it is read when torch is imported

# This checkout is what is measured, whether it is installed or not.
SCRIPTS = Path(__file__).resolve().parent
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]

from benchmarking.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
