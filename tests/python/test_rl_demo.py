"""The RL demo, tiny: real trainers and ranks, a real kill and a real stop, results to read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from demo_process import COMMAND, interrupt, processes_of
from transfuse.demo import __main__ as command
from transfuse.demo.channel import ChildFailedError
from transfuse.demo.results import Results, ResultsError, check_room
from transfuse.demo.rl.command import perform
from transfuse.demo.rl.judge import LAST, judge
from transfuse.demo.rl.rollout import Batch, Rollout
from transfuse.demo.rl.run import Run
from transfuse.demo.rl.settings import Settings, tiny, with_steps
from transfuse.demo.rl.task import ASK, advantages, make_prompts, rewards
from transfuse.demo.screen import PlainScreen


def shared_memory():
    return {path.name for path in Path("/dev/shm").iterdir()}


def run_demo(tmp_path_factory, *arguments):
    """Folder, text and report of one run, and what it has left behind."""
    out, temporary = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("temporary")
    before = shared_memory()
    with subprocess.Popen(
        [*COMMAND, "--out", str(out), *arguments],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as demo:
        text, _ = demo.communicate(timeout=280)
    assert demo.returncode == 0, text
    left = {
        "processes": processes_of(f"demo-{demo.pid}"),
        "files": [path.name for path in temporary.iterdir()],
        "shared memory": sorted(shared_memory() - before),
    }
    return out, text, json.loads((out / "report.json").read_text()), left


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return run_demo(tmp_path_factory)


@pytest.fixture(scope="module")
def megatron_run(tmp_path_factory):
    pytest.importorskip("megatron", reason="megatron-core is not installed")
    return run_demo(tmp_path_factory, "--trainer", "megatron:tp=2", "--steps", "4")


def steps_of(tiny_run, run="live"):
    return tiny_run[2][run]["steps"]


def test_every_rollout_is_of_one_version_on_both_ranks_and_versions_rise(tiny_run):
    steps = steps_of(tiny_run)
    assert len(steps) == 8
    for row in steps:
        assert row["rank_versions"] == [row["rollout_version"]] * 2
        assert row["published"] == row["trained_version"] + 1
        assert 0 <= row["lag"] == row["trained_version"] - row["rollout_version"] <= 2
    for name in ("rollout_version", "engine_version"):
        versions = [row[name] for row in steps]
        assert versions == sorted(versions)
    assert steps[-1]["engine_version"] > steps[0]["engine_version"] == 1
    held_out = tiny_run[2]["live"]["held_out"]
    assert held_out["as trained"]["version"] == steps[-1]["published"]


def test_every_refit_is_proved_mapped_and_has_its_phases(tiny_run):
    refits = [row["refit"] for row in steps_of(tiny_run) if row["refit"]]
    assert refits
    for refit in refits:
        assert refit["verified"] is True
        assert refit["routes"] == ["memfd"]
        assert refit["phases_us"]["transfer"] > 0
        assert refit["pause_ms"] > 0
        assert refit["memcpy_gbps"] > 0
    assert "version 9" in tiny_run[1]


def test_the_group_was_broken_by_the_kill_named_the_rank_and_became_whole(tiny_run):
    events = {event["what"]: event for event in tiny_run[2]["live"]["events"]}
    assert list(events) == ["killed", "broken", "whole", "stopped", "continued"]
    assert events["killed"]["who"] == "engine0.tp1"
    assert "engine0.tp1" in events["broken"]["reason"]
    assert events["whole"]["pid"] != events["killed"]["pid"]
    lost_with = steps_of(tiny_run)[events["killed"]["step"] - 1]
    assert events["whole"]["version"] >= lost_with["trained_version"]
    assert "BROKEN" in tiny_run[1]
    assert "WHOLE again" in tiny_run[1]


def test_the_engine_served_while_a_stopped_trainer_kept_a_version_half_published(tiny_run):
    continued = tiny_run[2]["live"]["events"][-1]
    assert continued["who"] == "trainer1"
    assert continued["seconds"] >= 1.0
    assert "OPEN, 1 of 2" in continued["waited_for"]
    assert continued["waited_for"].endswith("missing: trainer1")
    assert continued["served"]["answers"] > 0
    assert continued["group"] == "WHOLE"
    following = steps_of(tiny_run)[continued["step"]]
    assert following["refit"]["phases_us"]["lease"] > 900_000  # what the stage waited for


def test_the_control_run_begins_alike_and_keeps_its_first_version(tiny_run):
    report = tiny_run[2]
    assert report["verdict"]["same_start"] is True
    assert report["verdict"]["judged"] is False
    assert report["live"]["collectives"] == report["control"]["collectives"] == "gloo"
    assert "2 FSDP2 trainers, over gloo, hold the policy" in tiny_run[1]
    control = steps_of(tiny_run, "control")
    assert [row["rollout_version"] for row in control] == [1] * 8
    assert [row["lag"] for row in control] == list(range(8))
    assert [row["refit"] for row in control] == [None] * 8
    assert control[0]["reward"] == steps_of(tiny_run)[0]["reward"]
    assert report["control"]["events"] == []


def test_pictures_and_the_plan_are_written(tiny_run):
    out = tiny_run[0]
    for name in ("reward.png", "refit_phases.png", "pauses.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(out / "plan.svg").getroot().tag.endswith("svg")
    assert "engine0.tp1" in (out / "plan.txt").read_text()


def test_an_engine_whose_layout_is_captured_runs_the_same(tiny_run):
    """Of four steps: the same first rollout, from a layout that equals that of the formula."""
    with tempfile.TemporaryDirectory() as folder:
        settings = dataclasses.replace(
            tiny(Settings(job=f"test-captured-{os.getpid()}", folder=f"{folder}/run")),
            engine="captured",
            steps=4,
            kill_at=0,
            stop_at=0,
        )
        report, _ = perform(Run(settings, PlainScreen()))
    assert [found["counts"]["direct"] for found in report["captured"]] == [24, 24]
    assert [found["counts"]["fallback"] for found in report["captured"]] == [0, 0]
    refits = [row["refit"] for row in report["steps"] if row["refit"]]
    assert refits, report["steps"]
    assert all(refit["verified"] for refit in refits)
    assert report["steps"][0]["reward"] == steps_of(tiny_run)[0]["reward"]


def test_nothing_is_left_of_a_run(tiny_run):
    assert tiny_run[3] == {"processes": [], "files": [], "shared memory": []}


def test_megatron_begins_with_the_bytes_of_fsdp2_and_computes_what_it_does(megatron_run, tiny_run):
    first, expected = steps_of(megatron_run)[0], steps_of(tiny_run)[0]
    # Tokens drawn from equal weights, and their probabilities under the trainer's own model.
    assert first["reward"] == expected["reward"]
    assert first["ratio"] == pytest.approx(expected["ratio"], rel=1e-5)
    assert (
        megatron_run[2]["live"]["held_out"]["at the start"]
        == (tiny_run[2]["live"]["held_out"]["at the start"])
    )


def test_megatron_trainers_refit_the_engine_through_kills_and_stops_too(megatron_run):
    _, text, report, left = megatron_run
    assert "2 Megatron-Core trainers" in text
    assert report["settings"]["trainer"] == "megatron:tp=2"
    assert report["verdict"]["same_start"] is True
    events = [event["what"] for event in report["live"]["events"]]
    assert events == ["killed", "broken", "whole", "stopped", "continued"]
    assert report["live"]["held_out"]["as trained"]["version"] == 5
    refits = [row["refit"] for row in report["live"]["steps"] if row["refit"]]
    assert refits
    assert all(refit["verified"] for refit in refits)
    assert left == {"processes": [], "files": [], "shared memory": []}


def test_the_demo_says_how_to_get_a_trainer_that_is_missing(tmp_path):
    without = "import sys; sys.modules['megatron'] = None; "  # as where it is not installed
    call = "from transfuse.demo.__main__ import main; sys.exit(main())"
    demo = subprocess.run(
        [sys.executable, "-c", without + call, "--trainer", "megatron:tp=2"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert demo.returncode == command.EXIT_MISSING
    assert demo.stdout == ""
    assert demo.stderr == (
        "transfuse demo needs megatron-core: pip install megatron-core, or `make demo` in the "
        "repository\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_rollout_that_is_older_than_the_bound_is_answered_again():
    with tempfile.TemporaryDirectory() as folder:
        settings = dataclasses.replace(
            tiny(Settings(job=f"test-lag-{os.getpid()}", folder=f"{folder}/run")),
            steps=4,
            kill_at=0,
            stop_at=0,
            max_lag=1,
        )
        report, _ = perform(Run(settings, PlainScreen()))
    assert [row["lag"] for row in report["steps"]] == [0, 1, 0, 1]
    assert [row["rollout_version"] for row in report["steps"]] == [1, 1, 3, 3]


def test_an_interrupted_run_leaves_no_process(tmp_path):
    run = [*COMMAND, "--out", str(tmp_path / "out")]
    assert interrupt(run, tmp_path / "log", at_least=4) == (command.EXIT_INTERRUPTED, [])


def test_a_disk_that_is_full_at_the_end_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "report.json.part").symlink_to("/dev/full")
    with subprocess.Popen(
        [*COMMAND, "--steps", "2", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        _, errors = demo.communicate(timeout=280)
    assert demo.returncode == command.EXIT_FAILED
    path = tmp_path / "report.json"
    assert errors == f"the demo failed: {path} was not written: No space left on device\n"
    assert processes_of(f"demo-{demo.pid}") == []
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def mounted(folder, size):
    """A file system of its own."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted: not root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "small", "64k") as folder:
        yield folder


def test_a_disk_that_fills_up_while_processes_start_is_said(tmp_path):
    with mounted(tmp_path / "disk", "9m") as disk:
        with subprocess.Popen(
            [*COMMAND, "--out", str(tmp_path / "out")],
            env={**os.environ, "TMPDIR": str(disk)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as demo:
            deadline = time.monotonic() + 60
            while not list(disk.glob("*/live/*.log")) and time.monotonic() < deadline:
                time.sleep(0.01)
            with contextlib.suppress(OSError), (disk / "fill").open("wb", buffering=0) as fill:
                while fill.write(bytes(4096)):
                    pass
            _, errors = demo.communicate(timeout=280)
        (disk / "fill").unlink()
        assert demo.returncode == command.EXIT_FAILED
        assert errors.startswith(f"the demo failed: {disk}")
        assert "KiB free" in errors
        assert errors.count("\n") == 1
        assert processes_of(f"demo-{demo.pid}") == []
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("which", ["results", "temporary"])
def test_a_disk_that_is_too_small_is_said_before_anything_starts(tmp_path, small_disk, which):
    out = small_disk if which == "results" else tmp_path / "out"
    environment = {} if which == "results" else {"TMPDIR": str(small_disk)}
    demo = subprocess.run(
        [*COMMAND, "--out", str(out)],
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert demo.returncode == command.EXIT_FAILED
    assert demo.stderr.startswith(f"the demo failed: {small_disk}")
    assert demo.stderr.endswith("expected at least 8 MiB\n")
    assert demo.stderr.count("\n") == 1
    assert list(small_disk.iterdir()) == []
    assert demo.stdout == ""


def test_results_that_do_not_fit_leave_no_partial_file(small_disk):
    results = Results(small_disk)
    results.write("small.txt", "fits")
    with pytest.raises(ResultsError, match="large.bin was not written: No space left on device"):
        results.write("large.bin", bytes(1 << 20))
    assert results.names() == ["small.txt"]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="Not a directory"):
        check_room(tmp_path / "file" / "out")


def report_of(reward, trained):
    return {
        "steps": [{"reward": 0.0}] + [{"reward": reward}] * LAST,
        "held_out": {"as trained": {"reward": trained}},
    }


@pytest.mark.parametrize(
    ("live", "control", "same_start", "good"),
    [
        ((0.8, 0.8), (0.1, 0.4), True, True),
        ((0.8, 0.8), (0.1, 0.4), False, False),  # the runs cannot be compared
        ((0.3, 0.8), (0.1, 0.4), True, False),  # the engine answers no better
        ((0.8, 0.5), (0.1, 0.4), True, False),  # stale rollouts would have done
    ],
)
def test_the_judge_wants_the_margin_twice_and_the_same_start(live, control, same_start, good):
    verdict = judge(
        report_of(*live),
        report_of(*control),
        same_start=same_start,
        margin=0.3,
        trained_margin=0.15,
    )
    assert verdict["good"] is good
    assert verdict["judged"] is True


def test_a_reward_can_be_checked_by_hand():
    assert rewards([3, 1, 2, 0, ASK], [0, 1, 3, 3]) == [1, 1, 0, 1]
    assert make_prompts("7", 3, 4) == make_prompts("7", 3, 4) != make_prompts("8", 3, 4)
    assert all(prompt[-1] == ASK and len(prompt) == 5 for prompt in make_prompts("7", 9, 4))


def test_advantages_are_relative_to_the_group_at_each_place():
    first, second = advantages([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert first[0] == -second[0] > 0
    assert first[1:] == second[1:] == [0.0, 0.0]


def answer_of(version, token_versions, tokens):
    return {
        "version": version,
        "token_versions": token_versions,
        "tokens": tokens,
        "log_probabilities": [[-1.0] * len(row) for row in tokens],
    }


def test_a_rollout_of_mixed_versions_is_refused():
    batch = Batch("rollout 1", [[2, 1, ASK]], 2, 1.0, 0)
    tokens = [[1, 2], [2, 1]]
    rollout = Rollout.of(batch, [answer_of(3, [3], tokens)] * 2)
    assert (rollout.version, rollout.reward, rollout.solved) == (3, 0.5, 0.5)
    for other in (answer_of(4, [4], tokens), answer_of(3, [3, 4], tokens)):
        with pytest.raises(ChildFailedError, match=r"of versions \[3, 4\]"):
            Rollout.of(batch, [answer_of(3, [3], tokens), other])


def test_what_happens_to_processes_happens_within_any_number_of_steps():
    for steps in range(2, 40):
        settings = with_steps(Settings(job="", folder=""), steps)
        assert 1 <= settings.kill_at < settings.stop_at <= steps


@pytest.mark.parametrize(
    "arguments",
    [
        ["--text", "x"],
        ["--steps", "1"],
        ["--nonsense"],
        ["--trainer", "megatron:tp=3"],
        ["--pretrain", "--trainer", "megatron:tp=2"],
        ["--engine", "guessed"],
        ["--engine", "captured", "--pretrain"],
    ],
)
def test_wrong_usage_has_its_exit_code(arguments):
    with pytest.raises(SystemExit) as caught:
        command.parse(arguments)
    assert caught.value.code == command.EXIT_USAGE
