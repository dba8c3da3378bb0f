"""Runs the reinforcement learning demo, its control run, and says what came of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import transfuse
from transfuse.demo.layouts import explain
from transfuse.demo.plots import draw_phases
from transfuse.demo.results import Results
from transfuse.demo.rl.judge import judge
from transfuse.demo.rl.plots import draw_pauses, draw_reward
from transfuse.demo.rl.run import Run
from transfuse.demo.rl.settings import RANK_NAMES, TRAINER_NAMES, Settings, tiny, with_steps
from transfuse.demo.screen import Screen, open_screen

TINY_STEPS = 8


def settings_of(options: argparse.Namespace, job: str, folder: str) -> Settings:
    """Settings of the run that was asked for."""
    settings = Settings(
        job=f"{job}-live",
        folder=f"{folder}/live",
        seed=options.seed,
        trainer=options.trainer,
        device=options.device,
        engine=options.engine,
    )
    if options.tiny:
        settings = with_steps(tiny(settings), TINY_STEPS)
    if options.steps is not None:
        settings = with_steps(settings, options.steps)
    return settings


def perform(run: Run) -> tuple[dict[str, Any], str]:
    """A run from its start to its end: its report and its fingerprints."""
    finished = False
    run.settings.path.mkdir()
    try:
        run.open()
        run.train()
        fingerprints = run.verify()
        report = run.report()
        finished = True
    finally:
        run.crew.stop(at_once=not finished)
    return report, fingerprints


def refits_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every refit that a step has seen, with the step and the trainers' share in it."""
    shared = ("step", "publish_ms")
    return [
        {**row["refit"], **{name: row[name] for name in shared}}
        for row in report["steps"]
        if row["refit"] is not None
    ]


def summary_of(report: dict[str, Any]) -> dict[str, float]:
    """Medians over the refits of a run."""
    refits = refits_of(report)
    if not refits:
        return {}
    return {
        "refit_ms": median(r["phases_us"]["total"] / 1e3 for r in refits),
        "transfer_ms": median(r["phases_us"]["transfer"] / 1e3 for r in refits),
        "engine_pause_ms": median(r["pause_ms"] for r in refits),
        "trainer_publish_ms": median(r["publish_ms"] for r in refits),
        "share_of_memcpy": median(r["gbps"] / r["memcpy_gbps"] for r in refits),
        "largest_lag": max(row["lag"] for row in report["steps"]),
    }


def write_results(
    report: dict[str, Any], explanation: transfuse.Explanation, results: Results
) -> None:
    """report.json, plots and the plan."""
    results.write("report.json", json.dumps(report, indent=1) + "\n")
    live, control = report["live"], report["control"]
    names = {"killed": "engine rank killed", "stopped": "trainer stopped"}
    marks = {names[e["what"]]: e["step"] for e in live["events"] if e["what"] in names}
    results.draw("reward.png", draw_reward(live["steps"], control["steps"], marks))
    refits = refits_of(live)
    results.draw("refit_phases.png", draw_phases(refits, marks))
    results.draw("pauses.png", draw_pauses(refits, marks))
    results.write("plan.svg", explanation.to_svg())
    results.write("plan.txt", explanation.to_text())


def conclude(report: dict[str, Any], results: Results, screen: Screen) -> None:
    """The statement at the end."""
    verdict, medians = report["verdict"], report["medians"]
    rewards, trained = verdict["final_reward"], verdict["held_out_as_trained"]
    screen.say(
        f"final reward {rewards['live']:.3f} with refits, {rewards['control']:.3f} without; "
        f"held-out prompts from the trained weights {trained['live']:.3f} and "
        f"{trained['control']:.3f}"
    )
    if not verdict["judged"]:
        screen.say("too few steps to learn anything: the margin was not judged")
    elif verdict["good"]:
        screen.say(
            "The reward needs the refits: the differences are above "
            f"{verdict['margin']} and {verdict['trained_margin']}."
        )
    else:
        screen.say(
            f"THE REFITS DID NOT MAKE THE DIFFERENCE: expected {verdict['margin']} and "
            f"{verdict['trained_margin']}, from the same first rollout ({verdict['same_start']}). "
            "See report.json."
        )
    screen.say(
        f"medians: refit {medians['refit_ms']:.1f} ms behind the engine's back, transfer at "
        f"{medians['share_of_memcpy']:.0%} of memcpy; pause of the engine "
        f"{medians['engine_pause_ms']:.2f} ms, of a trainer {medians['trainer_publish_ms']:.2f} "
        f"ms; lag at most {medians['largest_lag']}"
    )
    screen.say(
        f"peak memory of all processes {report['peak_bytes'] / 2**30:.1f} GiB; "
        f"{report['seconds']:.0f} s; results in {results.folder}: {', '.join(results.names())}"
    )


def demo(options: argparse.Namespace, job: str, folder: str) -> bool:
    """Both runs, one after the other; True if the reward is there and needs the refits."""
    start = time.monotonic()
    settings = settings_of(options, job, folder)
    screen = open_screen(2 * settings.steps, plain=options.plain)
    try:
        screen.title("with refits: every version goes into the engine while it serves")
        live = Run(settings, screen)
        live_report, fingerprints = perform(live)
        screen.say(f"fingerprints: {fingerprints}")
        screen.title("the control run: the same, but the engine is never refitted")
        without = dataclasses.replace(
            settings, job=f"{job}-control", folder=f"{folder}/control", refits=False
        )
        control = Run(without, screen)
        control_report, _ = perform(control)
        verdict = judge(
            live_report,
            control_report,
            same_start=live.first_tokens == control.first_tokens,
            margin=settings.margin,
            trained_margin=settings.trained_margin,
        )
        peaks = [sum(run["peak_bytes"].values()) for run in (live_report, control_report)]
        report = {
            "verdict": verdict,
            "medians": summary_of(live_report),
            "seconds": time.monotonic() - start,
            "peak_bytes": max(peaks),
            "machine": {
                "cpu_count": len(os.sched_getaffinity(0)),
                "python": platform.python_version(),
            },
            "settings": json.loads(settings.to_json()),
            "live": live_report,
            "control": control_report,
        }
        screen.title("the verdict")
        results = Results(options.out)
        explanation = explain(Path(settings.folder), TRAINER_NAMES, RANK_NAMES)
        write_results(report, explanation, results)
        conclude(report, results, screen)
    finally:
        screen.close()
    return bool(verdict["good"])
