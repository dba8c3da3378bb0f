"""What is shown of every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfuse.demo.screen import Mood

_PHASES = ("discover", "lease", "transfer", "verify", "commit")  # it decides alone
LEGEND = (
    "refit times in ms; memcpy: share of what memcpy reaches at the same moment; check: the\n"
    "fingerprints of every byte that arrived against those of the trainers"
)
HEADER = (
    "step   loss  ver  total discov lease transfer verify commit  GB/s memcpy  check"  # 79 columns
)


def format_row(row: Mapping[str, Any]) -> str:
    """One line per step under HEADER."""
    begin = f"{row['step']:4d}{row['loss']:7.3f}"
    if "phases_us" not in row:
        return f"{begin}{row['published']:5d}  {row['note']}"
    ms = {name: row["phases_us"][name] / 1e3 for name in (*_PHASES, "total")}
    widths = zip(_PHASES, (7, 6, 9, 7, 7), strict=True)
    phases = "".join(f"{ms[name]:{width}.2f}" for name, width in widths)
    share = row["gbps"] / row["memcpy_gbps"]
    check = "equal" if row["verified"] else "NONE"
    rate = f"{row['gbps']:6.2f}{share:7.0%}"
    return f"{begin}{row['version']:5d}{ms['total']:7.2f}{phases}{rate}  {check}"


def mood_of(row: Mapping[str, Any]) -> Mood:
    """Bytes without proof are bad, a step without a refit is a remark."""
    if not row.get("verified", True):
        return Mood.BAD
    return Mood.GOOD if "phases_us" in row else Mood.NOTE
