"""The console script `transfuse`: runs the command that lies inside this package."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    """Replaces this process by transfuse/bin/transfuse, which starts this Python for the demo."""
    program = Path(__file__).resolve().parent / "bin" / "transfuse"
    os.environ.setdefault("TRANSFUSE_PYTHON", sys.executable)
    os.execv(program, ["transfuse", *sys.argv[1:]])
