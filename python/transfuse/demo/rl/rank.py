"""One rank of the engine: generates on command, brings versions in behind that, commits between.

Usage: python -m transfuse.demo.rl.rank <rank> <settings>
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import transfuse
from transfuse.demo.channel import Message, answer, commands
from transfuse.demo.devices import BACKENDS, GLOO, device_of
from transfuse.demo.layouts import save_layout
from transfuse.demo.memcpy import Memcpy
from transfuse.demo.plots import PHASES
from transfuse.demo.rl.settings import GROUP, MODEL, RANK_NAMES, RANKS, TRAINERS, Settings
from transfuse.engine import (
    Architecture,
    Completions,
    Engine,
    MixedVersionsError,
    Request,
    TensorParallel,
    Weights,
)


class SafePoint:
    """Commits the staged version when the driver has asked for it, and begins the next stage."""

    def __init__(self, receiver: transfuse.Receiver, deadline_s: float) -> None:
        self._receiver = receiver
        self._deadline_s = deadline_s
        self._stage: transfuse.Stage | None = None
        self._commit = False
        self._next = 0
        self.committed: dict[str, Any] | None = None  # how long the engine stood still for it

    def plan(self, *, commit: bool, stage: int) -> None:
        """For the next generation; `stage` 0: nothing."""
        self._commit, self._next, self.committed = commit, stage, None
        if not commit:
            self._begin_stage()

    def due(self) -> bool:
        """See transfuse.engine.SafePoint."""
        return self._commit

    def commit(self) -> int:
        """See transfuse.engine.SafePoint. If the group gives up, the version before stays."""
        self._commit = False
        if self._stage is None:
            raise transfuse.NotFoundError("a commit is due and nothing was staged")
        start = time.perf_counter()
        self._stage.wait(self._deadline_s)
        waited = time.perf_counter()
        with contextlib.suppress(transfuse.CancelledError):
            self._receiver.commit(timeout_s=self._deadline_s)
        end = time.perf_counter()
        self._stage = None
        self.committed = {"wait_ms": (waited - start) * 1e3, "pause_ms": (end - start) * 1e3}
        self._begin_stage()
        return self._receiver.version

    def give_up(self) -> None:
        """A stage that still moves ends; what was decided of one that is ready is for refit()."""
        stage, self._stage = self._stage, None
        if stage is not None:
            stage.cancel()
            with contextlib.suppress(transfuse.TransfuseError):
                stage.wait(self._deadline_s)

    def _begin_stage(self) -> None:
        if self._next:
            self._stage = self._receiver.stage(exactly=self._next, timeout_s=self._deadline_s)


class Rank:
    """Weights, receiver and engine of one rank. The engine is made anew when the ranks are."""

    def __init__(self, rank: int, settings: Settings) -> None:
        self._rank = rank
        self._settings = settings
        architecture = Architecture.parse(json.dumps(settings.model_config()))
        captured = settings.engine == "captured"
        device = device_of(settings.device, TRAINERS + rank)
        self._weights = Weights(
            architecture,
            rank=rank,
            size=RANKS,
            device=device,
            captured=captured,
            job=settings.job,
        )
        save_layout(settings.path, RANK_NAMES[rank], self._weights.layout)
        self._receiver = self._open_receiver()
        self._safe_point = SafePoint(self._receiver, settings.deadline_s)
        self._memcpy = Memcpy(self._weights.layout.parameter_bytes, device)
        self._engine: Engine | None = None

    def captured(self) -> dict[str, Any] | None:
        """How the layout was learned from the engine's own loader, if it was."""
        report = self._weights.report
        return None if report is None else {"counts": report.counts, "seconds": report.seconds}

    def close(self) -> None:
        """Leaves the group."""
        self._safe_point.give_up()
        self._receiver.close()

    def form(self, attempt: int) -> None:
        """Meets the other ranks."""
        self._engine = None
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group(
            BACKENDS[self._settings.device, GLOO],  # a rank that is killed hangs nobody
            init_method=f"file://{self._settings.path}/rendezvous-engine-{attempt}",
            rank=self._rank,
            world_size=RANKS,
            timeout=datetime.timedelta(seconds=self._settings.deadline_s),
        )
        answer("formed")

    def refit(self, at_least: int) -> None:
        """All ranks get the same version, before the engine serves from it."""
        self._safe_point.give_up()
        report = self._receiver.refit(at_least=at_least, timeout_s=self._settings.deadline_s)
        self._engine = Engine(
            self._weights,
            TensorParallel(dist.group.WORLD),
            slots=max(self._settings.prompts * self._settings.samples, self._settings.held_out),
            max_tokens=2 * self._settings.digits + 1,
            version=report.version,
        )
        self._engine.safe_point = self._safe_point
        answer("refitted", version=report.version, refit=self._numbers())

    def generate(self, command: Message) -> None:
        """Answers every prompt of a batch `samples` times, from one version."""
        if self._engine is None:
            raise transfuse.NotFoundError("no version has been brought in yet")
        self._safe_point.plan(commit=command["commit"], stage=command["stage"])
        requests = [
            Request(
                prompt,
                self._settings.digits,
                temperature=command["temperature"],
                seed=command["seed"] + index * command["samples"] + sample,
            )
            for index, prompt in enumerate(command["prompts"])
            for sample in range(command["samples"])
        ]
        completions = self._engine.generate(requests, commit_between_steps=False)
        refit = self._safe_point.committed
        if refit is not None:
            refit |= self._numbers()
        content = _content(completions) if self._rank == 0 else {}
        versions = sorted(set(completions.versions.flatten().tolist()))
        answer(
            "generated",
            version=self._receiver.version,
            token_versions=versions,
            refit=refit,
            **content,
        )

    def _open_receiver(self) -> transfuse.Receiver:
        """One that was killed may count as alive for a moment longer."""
        give_up = time.monotonic() + self._settings.deadline_s
        while True:
            try:
                return transfuse.Receiver(
                    self._weights.layout,
                    self._weights.parameters,
                    name=RANK_NAMES[self._rank],
                    model=MODEL,
                    into="shadow",
                    group=GROUP,
                    group_size=RANKS,
                    spread=self._rank,
                    job=self._settings.job,
                )
            except transfuse.AlreadyExistsError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.1)

    def _numbers(self) -> dict[str, Any]:
        """Of the refit that ended last, and memcpy at this moment."""
        report = self._receiver.last_report
        return {
            "version": report.version,
            "verified": report.verified_bytes == report.size_bytes > 0,
            "size_bytes": report.size_bytes,
            "verified_bytes": report.verified_bytes,
            "planned": report.planned,
            "phases_us": {p: getattr(report.phases, f"{p}_us") for p in (*PHASES, "total")},
            "gbps": report.gigabytes_per_second,
            "memcpy_gbps": self._memcpy.gigabytes_per_second(),
            "routes": sorted({route.route for route in report.routes}),
        }


def _content(completions: Completions) -> dict[str, Any]:
    return {
        "tokens": completions.tokens.tolist(),
        "log_probabilities": completions.log_probabilities.tolist(),
    }


def obey(rank: Rank, command: Message) -> None:
    """One command; an operating failure is an answer too."""
    try:
        if command["do"] == "form":
            rank.form(command["attempt"])
        elif command["do"] == "refit":
            rank.refit(command["at_least"])
        elif command["do"] == "generate":
            rank.generate(command)
    except (transfuse.TransfuseError, MixedVersionsError) as error:
        answer("failed", message=f"{type(error).__name__}: {error}")


def main() -> None:
    """Joins the group and serves until the end of input."""
    rank, settings = int(sys.argv[1]), Settings.from_json(sys.argv[2])
    torch.set_num_threads(1)
    served = Rank(rank, settings)
    answer("ready", captured=served.captured())
    for command in commands():
        obey(served, command)
    served.close()


if __name__ == "__main__":
    main()
