"""Whether the reward is there, and whether it needs the refits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

LAST = 10  # steps that make a final reward


def final_reward(rows: Sequence[Mapping[str, Any]]) -> float:
    """The mean over the last rollouts."""
    return fmean(row["reward"] for row in rows[-LAST:])


def judge(
    live: Mapping[str, Any],
    control: Mapping[str, Any],
    *,
    same_start: bool,
    margin: float | None,
    trained_margin: float,
) -> dict[str, Any]:
    """Compares the reports of two runs. `good`: they began alike, and refits made the difference.

    The difference counts twice: in the rollouts at the end, and on held-out prompts answered from
    the weights that each run has trained. Without a margin only the beginning is judged.
    """
    rewards = {"live": final_reward(live["steps"]), "control": final_reward(control["steps"])}
    trained = {
        name: run["held_out"]["as trained"]["reward"]
        for name, run in (("live", live), ("control", control))
    }
    gain = rewards["live"] - rewards["control"]
    gain_trained = trained["live"] - trained["control"]
    judged = margin is not None
    learned = margin is None or (gain >= margin and gain_trained >= trained_margin)
    return {
        "good": same_start and learned,
        "judged": judged,
        "same_start": same_start,
        "margin": margin,
        "trained_margin": trained_margin,
        "final_reward": rewards,
        "held_out_as_trained": trained,
        "gain": gain,
        "gain_as_trained": gain_trained,
    }
