"""The run: starts the processes, drives them step by step, judges the result, cleans up."""

from __future__ import annotations

import json
import os
import platform
import time
from typing import Any

from transfuse.demo.channel import START_S, Child, ChildFailedError, Message
from transfuse.demo.crew import Crew
from transfuse.demo.devices import GLOO, in_words
from transfuse.demo.layouts import explain
from transfuse.demo.plots import draw_phases
from transfuse.demo.pretrain.plots import draw_loss
from transfuse.demo.pretrain.rows import HEADER, LEGEND, format_row, mood_of
from transfuse.demo.pretrain.settings import MODEL, TRAINERS, Settings
from transfuse.demo.results import Results
from transfuse.demo.screen import Screen

STEPS_ALONE = 5


class Run:
    """Trainers and engine of one demo. stop() ends them all, whatever state they are in."""

    def __init__(self, settings: Settings, screen: Screen) -> None:
        self.settings = settings
        self.screen = screen
        self.rows: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self._start = time.monotonic()
        self._crew = Crew(settings.job, settings.path)
        self._trainers: list[Child] = []
        self._collectives = GLOO  # of the trainers
        self._engine: Child | None = None
        self._starting: float | None = None  # since when an engine is on its way

    def open(self) -> None:
        """Starts everybody and waits until they have joined."""
        module, settings = "transfuse.demo.pretrain.trainer", self.settings.to_json()
        for rank in range(TRAINERS):
            self._trainers.append(self._crew.start(f"trainer{rank}", module, str(rank), settings))
        self._start_engine()
        for trainer in self._trainers:
            self._collectives = trainer.expect("ready", timeout_s=START_S)["collectives"]
        assert self._engine is not None
        ready = self._engine.expect("ready", timeout_s=START_S)
        self._starting = None
        count = ready["parameters"] / 1e6
        self.screen.say(
            f"{TRAINERS} FSDP2 trainers, {in_words(self.settings.device, self._collectives)}, hold "
            f"{count:.1f} million parameters in f32, sharded; the engine holds them in bf16, whole."
        )

    def train(self) -> None:
        """All steps; half-way the engine is killed and started again."""
        self.screen.title("training; after every optimizer step the engine is refitted")
        self.screen.say(LEGEND)
        self.screen.say(HEADER)
        self._refit_and_sample(step=0, published=1)
        kill_at = max(1, self.settings.steps // 2)
        alone = min(STEPS_ALONE, self.settings.steps // 4)
        for step in range(1, self.settings.steps + 1):
            stepped = self._step()
            published = int(stepped["version"])
            row: dict[str, Any] = {"step": step, "published": published}
            row.update(loss=stepped["loss"], step_s=stepped["step_s"])
            self.rows.append(row)
            if step == kill_at:
                self._kill_engine(step, published)
            # The trainers go on without it, but not for so long that its return is not seen.
            self._welcome_engine(step, wait=step >= kill_at + alone)
            if self._engine is not None and self._starting is None:
                row.update(self._refit(published))
            else:
                row["note"] = "no engine: it was killed and is on its way back"
            self.screen.row(format_row(row), mood_of(row))
            if "version" in row and step % self.settings.sample_every == 0:
                self._sample(step)
        if self._starting is not None:
            self._welcome_engine(self.settings.steps, wait=True)
            self._refit_and_sample(self.settings.steps, published)

    def judge(self) -> dict[str, Any]:
        """Compares the engine with the trainers' parameters, gathered and cast by torch alone."""
        self.screen.title("the judge: the trainers' parameters, gathered and cast by torch alone")
        reference, state = self.settings.path / "reference.pt", self.settings.path / "engine.pt"
        for trainer in self._trainers:
            trainer.send(do="reference", path=str(reference))
        answers = [t.expect("reference", timeout_s=self._deadline) for t in self._trainers]
        versions = {answer["version"] for answer in answers}
        engine = self._live_engine()
        engine.send(do="state", path=str(state))
        versions.add(engine.expect("state", timeout_s=self._deadline)["version"])
        if len(versions) != 1:
            raise ChildFailedError(f"trainers and engine hold different versions: {versions}")
        from transfuse.demo.pretrain.judge import compare

        verdict = compare(self.settings, reference, state)
        verdict["version"] = versions.pop()
        return verdict

    def verify(self) -> str:
        """What `transfuse verify` says about the live processes."""
        report = self._crew.control.verify(MODEL, timeout_s=self._deadline)
        if not report.matches:
            raise ChildFailedError(f"fingerprints differ:\n{report.to_text()}")
        return report.to_text().strip()

    def report(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """Everything about the run as data."""
        self._crew.note_peaks()
        warm = [r for r in self.rows if "phases_us" in r and not r["planned"]]
        totals = sorted(row["phases_us"]["total"] / 1e3 for row in warm)
        shares = sorted(row["gbps"] / row["memcpy_gbps"] for row in warm)
        return {
            "verdict": verdict,
            "settings": json.loads(self.settings.to_json()),
            "machine": {
                "cpu_count": len(os.sched_getaffinity(0)),
                "python": platform.python_version(),
            },
            "seconds": time.monotonic() - self._start,
            "peak_bytes": self._crew.peak_bytes,
            "collectives": self._collectives,
            "warm_refit_ms_median": totals[len(totals) // 2] if totals else None,
            "share_of_memcpy_median": shares[len(shares) // 2] if shares else None,
            "events": self.events,
            "samples": self.samples,
            "steps": self.rows,
        }

    def stop(self, *, at_once: bool) -> None:
        """Ends every process that this run started, `at_once` without waiting for good manners."""
        self._crew.stop(at_once=at_once)

    @property
    def _deadline(self) -> float:
        return self.settings.deadline_s

    def _start_engine(self) -> None:
        module = "transfuse.demo.pretrain.engine"
        self._engine = self._crew.start("engine0", module, self.settings.to_json())
        self._starting = time.monotonic()

    def _live_engine(self) -> Child:
        if self._engine is None or self._starting is not None:
            raise ChildFailedError("the engine is not running")
        return self._engine

    def _step(self) -> Message:
        for trainer in self._trainers:
            trainer.send(do="step")
        return [t.expect("stepped", timeout_s=self._deadline) for t in self._trainers][0]

    def _refit(self, at_least: int) -> dict[str, Any]:
        engine = self._live_engine()
        engine.send(do="refit", at_least=at_least)
        refitted = engine.expect("refitted", timeout_s=self._deadline + 10)
        if not refitted["verified"]:
            raise ChildFailedError(f"version {refitted['version']} arrived without fingerprints")
        return {**_numbers(refitted), "planned": refitted["report"]["planned"]}

    def _sample(self, step: int) -> None:
        engine = self._live_engine()
        engine.send(do="sample")
        sampled = engine.expect("sampled", timeout_s=self._deadline)
        text = sampled["text"].strip()
        self.samples.append({"step": step, "version": sampled["version"], "text": text})
        self.screen.sample(f"the engine writes, from version {sampled['version']}", text)

    def _refit_and_sample(self, step: int, published: int) -> None:
        self._refit(published)
        self._sample(step)

    def _kill_engine(self, step: int, published: int) -> None:
        """In the middle of its work: a refit has just been asked for."""
        engine = self._live_engine()
        engine.send(do="refit", at_least=published)
        self._crew.kill(engine)
        self._event("killed", step, pid=engine.pid)
        self.screen.say(f"      SIGKILL to the engine, process {engine.pid}; another one starts")
        self._start_engine()

    def _welcome_engine(self, step: int, *, wait: bool = False) -> None:
        if self._engine is None or self._starting is None:
            return
        ready = self._engine.expect("ready", timeout_s=START_S) if wait else self._engine.poll()
        if ready is None:
            return
        if ready["kind"] != "ready":
            self._engine.expect("ready", timeout_s=0.1)  # says what has happened to it
        seconds = time.monotonic() - self._starting
        self._starting = None
        self._event("back", step, pid=self._engine.pid, seconds=seconds)
        self.screen.say(
            f"      the engine is back after {seconds:.1f} s, process {self._engine.pid}"
        )

    def _event(self, what: str, step: int, **more: Any) -> None:  # noqa: ANN401
        self.events.append({"what": what, "step": step, **more})


def _numbers(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "kind"}


def write_results(run: Run, verdict: dict[str, Any], results: Results) -> dict[str, Any]:
    """report.json, plots, plan picture and samples."""
    report = run.report(verdict)
    results.write("report.json", json.dumps(report, indent=1) + "\n")
    marks = {f"engine {e['what']}": e["step"] for e in run.events if e["what"] == "killed"}
    results.draw("loss.png", draw_loss(run.rows, marks))
    refits = [row for row in run.rows if "phases_us" in row]
    results.draw("refit_phases.png", draw_phases(refits, marks))
    trainers = [f"trainer{rank}" for rank in range(TRAINERS)]
    explanation = explain(run.settings.path, trainers, ["engine0"])
    results.write("plan.svg", explanation.to_svg())
    results.write("plan.txt", explanation.to_text())
    samples = (f"step {s['step']}, version {s['version']}:\n{s['text']}\n" for s in run.samples)
    results.write("samples.txt", "\n".join(samples))
    return report
