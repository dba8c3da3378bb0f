"""The package imports without torch and numpy, and its layouts work without them."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "numpy", "transformers"}:
            raise ImportError(f"{name} is blocked")
        return None

sys.meta_path.insert(0, Blocker())
try:
    import numpy
except ImportError:
    pass
else:
    sys.exit("the import hook does not block")

import transfuse

builder = transfuse.LayoutBuilder()
tensor = builder.tensor("w", transfuse.Dtype.F32, (4, 6))
parameter = builder.parameter("w", transfuse.Dtype.F32, 24)
builder.tile(tensor, transfuse.Box((0, 0), (4, 6)), parameter)
layout = builder.build()
plan = transfuse.compile(layout, [layout])
assert plan.size_bytes == 96, plan.size_bytes
assert "torch" not in sys.modules
assert "numpy" not in sys.modules
"""


def test_import_needs_neither_torch_nor_numpy():
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
