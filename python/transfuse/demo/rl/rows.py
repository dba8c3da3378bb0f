"""What is shown of every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEGEND = (
    "reward: share of digits in place; from, in: the version that answered, the one that learns\n"
    "from it; lag: versions between; clip: tokens whose importance ratio was clipped. engine: its\n"
    "version after the refit beside this step, in ms: lease, transfer and verify while it serves,\n"
    "pause (with decide and commit) while it does not; memcpy: share of what memcpy reaches now;\n"
    "equal: kB whose fingerprints are those of the trainers, all that a rank holds"
)
HEADER = (
    "step reward from   in lag   clip | engine  lease transfer verify decide commit  pause memcpy  "
    "equal"
)


def format_row(row: Mapping[str, Any]) -> str:
    """One line per step under HEADER."""
    begin = (
        f"{row['step']:4d}{row['reward']:7.3f}{row['rollout_version']:5d}"
        f"{row['trained_version']:5d}{row['lag']:4d}{row['clipped']:7.1%} |"
        f"{row['engine_version']:7d}"
    )
    refit = row["refit"]
    if refit is None:
        return begin
    ms = {name: us / 1e3 for name, us in refit["phases_us"].items()}
    share = refit["gbps"] / refit["memcpy_gbps"]
    return (
        f"{begin}{ms['lease']:7.1f}{ms['transfer']:9.2f}{ms['verify']:7.2f}{ms['decide']:7.2f}"
        f"{ms['commit']:7.2f}{refit['pause_ms']:7.2f}{share:7.0%}"
        f"{refit['verified_bytes'] / 1e3:7.0f}"
    )
