"""Runs the pre-training demo and says what came of it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from transfuse.demo.pretrain.run import Run, write_results
from transfuse.demo.pretrain.settings import Settings, tiny
from transfuse.demo.results import Results
from transfuse.demo.screen import Screen, open_screen


def settings_of(options: argparse.Namespace, job: str, folder: str) -> Settings:
    """Settings of the run that was asked for."""
    text = str(options.text.resolve()) if options.text else ""
    settings = Settings(job=job, folder=folder, text=text, device=options.device, seed=options.seed)
    if options.tiny:
        settings = tiny(settings)
    if options.steps is not None:
        settings = dataclasses.replace(settings, steps=options.steps)
    return settings


def conclude(
    verdict: dict[str, Any], report: dict[str, Any], results: Results, screen: Screen
) -> bool:
    """The statement at the end."""
    version = verdict["version"]
    equal: bool = (
        verdict["logits_equal"]
        and verdict["parameters_equal"] == verdict["parameters_compared"]
        and verdict["logits_of_other_weights_differ"] > 0
    )
    screen.say(
        f"version {version}: {verdict['logits_differing']} of {verdict['logits_compared']} logits "
        f"differ; {verdict['parameters_equal']} of {verdict['parameters_compared']} parameters are "
        "equal, bit for bit"
    )
    if equal:
        screen.say(
            f"The engine's logits of version {version} equal, bit for bit, those of the trainers' "
            "parameters gathered and cast independently."
        )
    else:
        screen.say("THE ENGINE DOES NOT HOLD THE TRAINERS' PARAMETERS. See report.json.")
    if report["warm_refit_ms_median"] is not None:
        screen.say(
            f"median warm refit: {report['warm_refit_ms_median']:.2f} ms, its transfer at "
            f"{report['share_of_memcpy_median']:.0%} of memcpy; peak memory of all processes "
            f"{sum(report['peak_bytes'].values()) / 2**30:.1f} GiB; {report['seconds']:.0f} s"
        )
    screen.say(f"results in {results.folder}: {', '.join(results.names())}")
    return equal


def demo(options: argparse.Namespace, job: str, folder: str) -> bool:
    """Runs and cleans up; True if the engine ended with the trainers' bits."""
    settings = settings_of(options, job, folder)
    screen = open_screen(settings.steps, plain=options.plain)
    run = Run(settings, screen)
    finished = False
    try:
        screen.title("starting two trainers and an inference process")
        run.open()
        run.train()
        verdict = run.judge()
        screen.say(f"fingerprints: {run.verify()}")
        results = Results(options.out)
        equal = conclude(verdict, write_results(run, verdict, results), results, screen)
        finished = True
    finally:
        screen.close()
        run.stop(at_once=not finished)
    return equal
