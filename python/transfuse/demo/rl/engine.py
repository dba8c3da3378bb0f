"""The driver's side of the engine: its ranks, and what the group says of them."""

from __future__ import annotations

import time
from typing import Any

import transfuse
from transfuse.demo.channel import START_S, Child, ChildFailedError, Message
from transfuse.demo.crew import Crew
from transfuse.demo.rl.rollout import Batch, Rollout
from transfuse.demo.rl.settings import GROUP, MODEL, RANK_NAMES, RANKS, Settings

_POLL_S = 0.02


class RankedEngine:
    """Two ranks that serve as one. `version` is what they hold; `staged` waits to be committed."""

    def __init__(self, settings: Settings, crew: Crew) -> None:
        self.version = 0
        self.staged = 0
        self.captured: list[dict[str, Any]] = []  # by rank: what a capture has found
        self._settings = settings
        self._crew = crew
        self._attempt = 0
        self._ranks: list[Child] = [self._start(rank) for rank in range(RANKS)]

    def open(self, at_least: int) -> list[dict[str, Any]]:
        """The ranks have started, meet each other and bring in their first version."""
        ready = [rank.expect("ready", timeout_s=START_S) for rank in self._ranks]
        self.captured = [said["captured"] for said in ready if said["captured"]]
        return self._form(at_least)

    def ask(self, batch: Batch, *, stage: int = 0) -> None:
        """Commits what is staged, begins to bring in version `stage`, and answers the batch."""
        message = {
            "prompts": batch.prompts,
            "samples": batch.samples,
            "temperature": batch.temperature,
            "seed": batch.seed,
        }
        commit, self.staged = self.staged > 0, stage
        for rank in self._ranks:
            rank.send(do="generate", commit=commit, stage=stage, **message)

    def take(self, batch: Batch) -> tuple[Rollout, dict[str, Any] | None]:
        """The answers, all of one version on both ranks, and the refit that came before them."""
        answers = [r.expect("generated", timeout_s=self._settings.deadline_s) for r in self._ranks]
        rollout = Rollout.of(batch, answers)
        self.version = rollout.version
        return rollout, _slowest([a["refit"] for a in answers])

    def refit(self, at_least: int) -> list[dict[str, Any]]:
        """Brings a version in on every rank, now."""
        for rank in self._ranks:
            rank.send(do="refit", at_least=at_least)
        answers = [r.expect("refitted", timeout_s=self._settings.deadline_s) for r in self._ranks]
        versions = [answer["version"] for answer in answers]
        if len(set(versions)) != 1 or not all(a["refit"]["verified"] for a in answers):
            raise ChildFailedError(f"after a refit the ranks hold versions {versions}: {answers}")
        self.version, self.staged = versions[0], 0
        return [answer["refit"] for answer in answers]

    def kill(self, rank: int) -> int:
        """SIGKILL while it answers a batch, which is lost with it. Returns its process id."""
        lost = self._ranks[rank]
        self._crew.kill(lost)
        for other in self._ranks[:rank] + self._ranks[rank + 1 :]:
            other.expect("failed", "generated", timeout_s=self._settings.deadline_s)
        return lost.pid

    def replace(self, rank: int, at_least: int) -> int:
        """Another process takes the place of one that was killed. Returns its process id."""
        self._ranks[rank] = self._start(rank)
        self._ranks[rank].expect("ready", timeout_s=START_S)
        self._form(at_least)
        return self._ranks[rank].pid

    def wait_for(self, state: transfuse.GroupState) -> transfuse.GroupInfo:
        """What the coordinator says of the group when it is in this state."""
        deadline = time.monotonic() + self._settings.deadline_s
        while True:
            group = self.group()
            if group.state == state:
                return group
            if time.monotonic() > deadline:
                found = f"{group.state.name} ({group.reason})"
                raise ChildFailedError(f"group {GROUP}: expected {state.name}, found {found}")
            time.sleep(_POLL_S)

    def group(self) -> transfuse.GroupInfo:
        """What the coordinator says of the group."""
        return next(g for g in self._crew.control.groups(MODEL) if g.name == GROUP)

    def _start(self, rank: int) -> Child:
        settings = self._settings.to_json()
        return self._crew.start(RANK_NAMES[rank], "transfuse.demo.rl.rank", str(rank), settings)

    def _form(self, at_least: int) -> list[dict[str, Any]]:
        self._attempt += 1
        for rank in self._ranks:
            rank.send(do="form", attempt=self._attempt)
        for rank in self._ranks:
            rank.expect("formed", timeout_s=self._settings.deadline_s)
        return self.refit(at_least)


def _slowest(refits: list[Message | None]) -> dict[str, Any] | None:
    """The refit of the rank that took longest. All have brought in the same, and proved it."""
    done = [refit for refit in refits if refit is not None]
    if not done:
        return None
    if len({refit["version"] for refit in done}) != 1 or len(done) != len(refits):
        raise ChildFailedError(f"the ranks have committed different versions: {refits}")
    if not all(refit["verified"] for refit in done):
        raise ChildFailedError(f"bytes arrived without matching fingerprints: {refits}")
    return max(done, key=lambda refit: float(refit["pause_ms"]))
