"""One run: an engine answers, trainers learn, versions go back; what fails is repaired."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import transfuse
from transfuse import GroupState
from transfuse.demo.channel import START_S, ChildFailedError
from transfuse.demo.crew import Crew
from transfuse.demo.devices import GLOO, in_words
from transfuse.demo.rl.engine import RankedEngine
from transfuse.demo.rl.rollout import Batch, Rollout, held_out_batch, training_batch
from transfuse.demo.rl.rows import HEADER, LEGEND, format_row
from transfuse.demo.rl.settings import (
    FSDP,
    GROUP,
    MODEL,
    RANK_NAMES,
    RANKS,
    TRAINER_NAMES,
    TRAINERS,
    Settings,
)
from transfuse.demo.screen import Mood, Screen

LOST_RANK = RANKS - 1  # which is killed
STOPPED = TRAINERS - 1  # the trainer that is stopped


class Run:
    """Trainers and engine of one run. stop() ends them all, whatever state they are in."""

    def __init__(self, settings: Settings, screen: Screen) -> None:
        self.settings = settings
        self.screen = screen
        self.rows: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.held_out: dict[str, dict[str, Any]] = {}
        self.first_tokens: list[list[int]] = []  # of the first rollout
        self.crew = Crew(settings.job, settings.path)
        self._version = 0  # that every trainer has published
        self._collectives = GLOO  # of the trainers
        self._start = time.monotonic()

    def open(self) -> None:
        """Starts everybody, and brings the first version into the engine."""
        module, settings = "transfuse.demo.rl.trainer", self.settings.to_json()
        self._trainers = [
            self.crew.start(name, module, str(rank), settings)
            for rank, name in enumerate(TRAINER_NAMES)
        ]
        self._engine = RankedEngine(self.settings, self.crew)
        for trainer in self._trainers:
            ready = trainer.expect("ready", timeout_s=START_S)
            self._version, self._collectives = ready["version"], ready["collectives"]
        first = self._engine.open(at_least=self._version)
        megabytes = first[0]["size_bytes"] / 1e6
        trainers = "FSDP2" if self.settings.trainer == FSDP else "Megatron-Core"
        self.screen.say(
            f"{TRAINERS} {trainers} trainers, {in_words(self.settings.device, self._collectives)}, "
            f"hold the policy in f32, sharded; the engine's {RANKS} ranks hold {megabytes:.1f} MB "
            "each in bf16, fused and tensor parallel"
        )
        for rank, found in enumerate(self._engine.captured):
            counts = ", ".join(f"{count} {way}" for way, count in found["counts"].items())
            self.screen.say(
                f"{RANK_NAMES[rank]}: layout captured from the engine's own load_weights in "
                f"{found['seconds'] * 1e3:.0f} ms; catalog tensors: {counts}"
            )

    def train(self) -> None:
        """All steps. While trainers learn from one rollout, the engine answers the next."""
        if self.settings.refits:
            self.screen.say(LEGEND)
        self.screen.say(HEADER)
        self._evaluate("at the start")
        batch = training_batch(self.settings, 1)
        self._engine.ask(batch)
        rollout, _ = self._engine.take(batch)
        self.first_tokens = rollout.tokens
        for step in range(1, self.settings.steps + 1):
            rollout = self._step(step, rollout)
        self._evaluate("as served")
        self._engine.refit(at_least=self._version)
        self._evaluate("as trained")

    def verify(self) -> str:
        """What `transfuse verify` says about the live processes."""
        report = self.crew.control.verify(MODEL, timeout_s=self.settings.deadline_s)
        if not report.matches:
            raise ChildFailedError(f"fingerprints differ:\n{report.to_text()}")
        return report.to_text().strip()

    def report(self) -> dict[str, Any]:
        """The run as data."""
        self.crew.note_peaks()
        return {
            "seconds": time.monotonic() - self._start,
            "peak_bytes": self.crew.peak_bytes,
            "collectives": self._collectives,
            "captured": self._engine.captured,
            "held_out": self.held_out,
            "events": self.events,
            "steps": self.rows,
        }

    def _step(self, step: int, rollout: Rollout) -> Rollout:
        """Learns from a rollout while the engine answers the next one, which is returned."""
        rollout = self._fresh(rollout)
        stops = self.settings.refits and step == self.settings.stop_at
        row: dict[str, Any] = {
            "step": step,
            "reward": rollout.reward,
            "solved": rollout.solved,
            "rollout_version": rollout.version,
            "rank_versions": rollout.rank_versions,
            "trained_version": self._version,
            "lag": self._version - rollout.version,
        }
        for rank, trainer in enumerate(self._trainers):
            share = rollout.share_of(rank, self.settings.shares)
            trainer.send(**share, stop=stops and rank == STOPPED)
        batch = training_batch(self.settings, step + 1)
        self._engine.ask(batch, stage=self._wanted())
        if self.settings.refits and step == self.settings.kill_at:
            self._lose_a_rank(step)
            self._engine.ask(batch)
        following, refit = self._engine.take(batch)
        if refit is not None and refit["version"] != following.version:
            self._event("given up", step, group=GROUP, version=refit["version"])
            said = (
                f"      group {GROUP} gave up version {refit['version']} and keeps the one before"
            )
            self.screen.say(said, Mood.NOTE)
            refit = None
        if stops:
            self._serve_without_a_trainer(step)
        stepped = [t.expect("stepped", timeout_s=self.settings.deadline_s) for t in self._trainers]
        self._version = stepped[0]["version"]
        slowest = max(s["publish_ms"] for s in stepped)
        row |= {n: stepped[0][n] for n in ("step_s", "ratio", "clipped")}
        row |= {"published": self._version, "publish_ms": slowest}
        row |= {"engine_version": self._engine.version, "refit": refit}
        self.rows.append(row)
        self.screen.row(format_row(row))
        return following

    def _wanted(self) -> int:
        """The version to bring in next, 0 if the engine has it or is on the way to it."""
        newest = self._version if self.settings.refits else 0
        return newest if newest > max(self._engine.version, self._engine.staged) else 0

    def _fresh(self, rollout: Rollout) -> Rollout:
        """The rollout, or its batch answered again if it is older than the bound allows."""
        if self.settings.refits and self._version - rollout.version > self.settings.max_lag:
            said = f"      {rollout.batch.name} is of version {rollout.version}: too old, once more"
            self.screen.say(said, Mood.NOTE)
            self._engine.refit(at_least=self._version)
            self._engine.ask(rollout.batch)
            rollout, _ = self._engine.take(rollout.batch)
        return rollout

    def _evaluate(self, when: str) -> None:
        batch = held_out_batch(self.settings)
        self._engine.ask(batch)
        answers, _ = self._engine.take(batch)
        found = {"version": answers.version, "reward": answers.reward, "solved": answers.solved}
        self.held_out[when] = found
        self.screen.say(
            f"      {batch.name} {when}, version {answers.version}: {answers.reward:.1%} of the "
            f"digits in place, {answers.solved:.1%} solved"
        )

    def _lose_a_rank(self, step: int) -> None:
        """SIGKILL to one rank in the middle of a rollout; another process takes its place."""
        start = time.monotonic()
        pid = self._engine.kill(LOST_RANK)
        self._event("killed", step, who=RANK_NAMES[LOST_RANK], pid=pid)
        self.screen.say(f"      SIGKILL to {RANK_NAMES[LOST_RANK]}, process {pid}", Mood.NOTE)
        broken = self._engine.wait_for(GroupState.BROKEN)
        seconds = time.monotonic() - start
        self._event("broken", step, group=GROUP, reason=broken.reason, seconds=seconds)
        self.screen.say(
            f"      group {GROUP} is BROKEN after {seconds:.2f} s: {broken.reason}; nothing is "
            "served, the rollout is lost, another process starts",
            Mood.NOTE,
        )
        pid = self._engine.replace(LOST_RANK, at_least=self._version)
        whole = self._engine.wait_for(GroupState.WHOLE)
        seconds = time.monotonic() - start
        self._event("whole", step, group=GROUP, version=whole.version, pid=pid, seconds=seconds)
        self.screen.say(
            f"      group {GROUP} is WHOLE again after {seconds:.1f} s: {RANK_NAMES[LOST_RANK]} is "
            f"process {pid}, every rank holds version {whole.version}; the rollout begins again",
            Mood.NOTE,
        )

    def _serve_without_a_trainer(self, step: int) -> None:
        """A trainer is stopped before it publishes: the engine serves on, its stage waits."""
        name, waiting = TRAINER_NAMES[STOPPED], self._version + 1
        pid = self._trainers[STOPPED].pid
        self._wait_until_stopped(pid)
        start = time.monotonic()
        self._event("stopped", step, who=name, pid=pid)
        self.screen.say(
            f"      {name}, process {pid}, is stopped (SIGSTOP) before it publishes", Mood.NOTE
        )
        batch = held_out_batch(self.settings)
        self._engine.ask(batch, stage=waiting)
        self._engine.take(batch)
        served, said = len(batch.prompts), self._why_not_ready(waiting)
        while time.monotonic() < start + self.settings.stop_s:
            self._answer_without_commit(batch)
            served += len(batch.prompts)
        group = self._engine.group()
        os.kill(pid, signal.SIGCONT)
        seconds = time.monotonic() - start
        self._event(
            "continued",
            step,
            who=name,
            seconds=seconds,
            waited_for=said,
            group=group.state.name,
            served={"version": self._engine.version, "answers": served},
        )
        self.screen.say(
            f"      the stage waited: {said}; meanwhile group {GROUP} was {group.state.name} and "
            f"gave {served} answers from version {self._engine.version}; {name} goes on after "
            f"{seconds:.1f} s",
            Mood.NOTE,
        )

    def _answer_without_commit(self, batch: Batch) -> None:
        """Serves while a stage moves; that stage is committed by a later call."""
        staged, self._engine.staged = self._engine.staged, 0
        self._engine.ask(batch)
        self._engine.take(batch)
        self._engine.staged = staged

    def _wait_until_stopped(self, pid: int) -> None:
        deadline = time.monotonic() + self.settings.deadline_s
        while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            if time.monotonic() > deadline:
                raise ChildFailedError(f"process {pid} was not stopped")
            time.sleep(0.01)

    def _opened(self, version: int) -> transfuse.VersionInfo:
        """As the coordinator knows it, once the trainer that goes on has begun to publish it."""
        deadline = time.monotonic() + self.settings.deadline_s
        while time.monotonic() < deadline:
            for known in self.crew.control.versions(MODEL):
                if known.version == version:
                    return known
            time.sleep(0.01)
        raise ChildFailedError(f"no trainer has begun to publish version {version}")

    def _why_not_ready(self, version: int) -> str:
        found = self._opened(version)
        missing = [
            m.name
            for m in self.crew.control.members(MODEL)
            if m.role == transfuse.MemberRole.SOURCE and m.version < version
        ]
        return (
            f"version {version} is {found.state.name}, {found.published} of {found.source_count} "
            f"sources have published it, missing: {', '.join(missing)}"
        )

    def _event(self, what: str, step: int, **more: Any) -> None:  # noqa: ANN401
        self.events.append({"what": what, "step": step, **more})
