"""Run as a folder: ``python scripts/benchmark``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log; it is read when torch is imported

# In the folder's own place: its modules are members of a package, and shall hide nobody else's.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmark.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
