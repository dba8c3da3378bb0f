"""The checked-in stub says what the extension module offers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import transfuse

STUB = Path(__file__).resolve().parents[2] / "python" / "transfuse" / "_transfuse.pyi"


def test_the_stub_is_what_stubgen_writes(tmp_path):
    written = tmp_path / "_transfuse.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "transfuse._transfuse"]
    subprocess.run([*command, "-o", str(written)], check=True, timeout=60)
    assert STUB.read_text() == written.read_text(), "run: ninja -C <build> stub"


def test_the_package_is_marked_as_typed():
    assert (Path(transfuse.__file__).parent / "py.typed").is_file()
