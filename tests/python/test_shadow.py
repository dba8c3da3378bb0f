"""Staging into a shadow from Python, and an engine of two processes that commits all or none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import transfuse
from shadow_rank import model, total
from transfuse import StageState, hf

RANK = Path(__file__).resolve().parent / "shadow_rank.py"


def fill(weights):
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.normal_()


def same(source, target):
    pairs = zip(source.parameters(), target.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def copy_of(weights):
    return [p.detach().clone() for p in weights.parameters()]


def unchanged(weights, before):
    return all(torch.equal(a, b) for a, b in zip(weights.parameters(), before, strict=True))


@pytest.fixture
def source(job):
    weights = model()
    with transfuse.Publisher(*hf.layout(weights), name="trainer0", job=job) as trainer:

        def publish(version):
            with trainer.write(version):
                fill(weights)

        weights.publish = publish
        yield weights


def shadow(weights, job, **options):
    layout, parameters = hf.layout(weights)
    return transfuse.Receiver(layout, parameters, name="engine0", job=job, into="shadow", **options)


def test_parameters_change_in_the_commit_and_not_before(job, source):
    target = model()
    with shadow(target, job) as engine:
        source.publish(1)
        engine.refit(timeout_s=30)
        assert same(source, target)
        before = copy_of(target)
        source.publish(2)
        stage = engine.stage(exactly=2, timeout_s=30)
        ready = stage.wait(30)
        assert (ready.state, ready.version) == (StageState.READY, 2)
        assert ready.landed_bytes == ready.size_bytes > 0
        assert engine.version == 1
        assert unchanged(target, before)
        report = engine.commit(timeout_s=30)
        assert (report.version, engine.version) == (2, 2)
        assert report.verified_bytes == report.size_bytes
        assert report.phases.commit_us > 0
        assert same(source, target)
        assert stage.progress.state == StageState.NONE
        with pytest.raises(transfuse.NotFoundError):
            engine.commit(timeout_s=1)
        assert transfuse.shadow_bytes(hf.layout(target)[0]) >= report.size_bytes


def test_rollback_brings_back_the_version_before(job, source):
    target = model()
    with shadow(target, job, keep_previous=True) as engine:
        source.publish(1)
        engine.refit(timeout_s=30)
        first = copy_of(target)
        source.publish(2)
        engine.refit(timeout_s=30)
        assert same(source, target)
        assert engine.rollback() == 1
        assert engine.version == 1
        assert unchanged(target, first)
        with pytest.raises(transfuse.NotFoundError):
            engine.rollback()


def test_a_stage_that_waits_can_be_cancelled_and_leaves_the_version(job, source):
    target = model()
    with shadow(target, job) as engine:
        source.publish(1)
        engine.refit(timeout_s=30)
        before = copy_of(target)
        stage = engine.stage(exactly=2, timeout_s=120)
        assert stage.progress.state == StageState.MOVING
        with pytest.raises(transfuse.AlreadyExistsError):
            engine.stage(timeout_s=1)
        with pytest.raises(transfuse.DeadlineExceededError):
            stage.wait(0.1)
        stage.cancel()
        with pytest.raises(transfuse.CancelledError):
            stage.wait(30)
        assert stage.progress.state == StageState.FAILED
        assert engine.version == 1
        assert unchanged(target, before)


def test_ctrl_c_ends_the_wait_and_the_stage_goes_on(job, source):
    target = model()
    with shadow(target, job) as engine:
        stage = engine.stage(exactly=1, timeout_s=120)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            stage.wait(120)
        assert time.monotonic() - start < 60
        source.publish(1)
        assert stage.wait(60).state == StageState.READY
        engine.commit(timeout_s=30)
        assert same(source, target)


def test_progress_of_a_capped_stage_never_falls(job, source):
    target = model()
    with shadow(target, job, chunk_bytes=1 << 10) as engine:
        source.publish(1)
        stage = engine.stage(timeout_s=60, max_gigabytes_per_second=0.0002)
        seen = []
        while stage.progress.state == StageState.MOVING:
            seen.append(stage.progress.landed_bytes)
            time.sleep(0.002)
        assert seen == sorted(seen)
        assert stage.wait(1).landed_bytes == stage.progress.size_bytes
        engine.commit(timeout_s=30)
        assert same(source, target)


def test_options_that_do_not_fit_are_refused(job):
    layout, parameters = hf.layout(model())
    with pytest.raises(transfuse.InvalidArgumentError, match="in_place, shadow"):
        transfuse.Receiver(layout, parameters, name="e", job=job, into="elsewhere")
    with pytest.raises(transfuse.InvalidArgumentError, match="group"):
        transfuse.Receiver(layout, parameters, name="e", job=job, group="engine")
    with transfuse.Receiver(layout, parameters, name="e", job=job) as engine:
        with pytest.raises(transfuse.UnsupportedError):
            engine.stage()
        with pytest.raises(transfuse.InvalidArgumentError):
            engine.check_group()


class Rank:
    """A process of the engine, told what to do line by line."""

    def __init__(self, job, rank, into="shadow"):
        self.process = subprocess.Popen(
            [sys.executable, str(RANK), job, str(rank), into],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
        )
        self.said()

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def said(self):
        line = self.process.stdout.readline()
        assert line, f"the rank ended with {self.process.wait(10)}"
        return json.loads(line)

    def do(self, line):
        self.tell(line)
        return self.said()

    def kill(self):
        self.process.kill()
        self.end()

    def end(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


class Ranks(list):
    """The ranks of one engine."""

    def all(self, line):
        for rank in self:
            rank.tell(line)
        return [rank.said() for rank in self]

    def expect(self, line, version, weights):
        for said in self.all(line):
            assert said == {"version": version, "sum": pytest.approx(total(weights))}


@pytest.fixture
def start_ranks(job):
    started = []

    def start(into="shadow"):
        ranks = Ranks(Rank(job, rank, into) for rank in range(2))
        started.append(ranks)
        return ranks

    yield start
    for ranks in started:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.kill()


@pytest.mark.parametrize("into", ["shadow", "in_place"])
def test_ranks_of_a_group_hold_the_same_version(job, source, start_ranks, into):
    ranks = start_ranks(into)
    for version in (1, 2, 3):
        source.publish(version)
        ranks.expect("refit 60", version, source)
        ranks.expect("check", version, source)
    groups = transfuse.Control(job=job).groups("model")
    assert [(g.name, g.size, g.state, g.version) for g in groups] == [
        ("engine", 2, transfuse.GroupState.WHOLE, 3)
    ]


def test_a_rank_that_is_killed_before_it_votes_aborts_the_round(job, source, start_ranks):
    ranks = start_ranks()
    source.publish(1)
    ranks.expect("refit 60", 1, source)
    old = total(source)
    source.publish(2)
    assert ranks[0].do("stage 60")["version"] == 1
    ranks[0].tell("commit 60")
    ranks[1].kill()
    said = ranks[0].said()
    assert said["error"] == "CancelledError", said
    assert "rank1" in said["message"]
    assert (said["version"], said["sum"]) == (1, pytest.approx(old))
    assert ranks[0].do("check")["error"] == "GroupBrokenError"
    ranks[1] = Rank(job, 1)
    ranks.expect("refit 60", 2, source)
    ranks.expect("check", 2, source)


def test_a_rank_that_is_killed_after_the_decision_breaks_the_group(job, source, start_ranks):
    ranks = start_ranks()
    source.publish(1)
    ranks.expect("refit 60", 1, source)
    source.publish(2)
    assert [said["version"] for said in ranks.all("stage 60")] == [1, 1]
    ranks[1].kill()  # both have voted
    said = ranks[0].do("commit 30")
    assert said["error"] == "GroupBrokenError", said
    assert ranks[0].do("check")["error"] == "GroupBrokenError"
    ranks[1] = Rank(job, 1)
    ranks.expect("refit 60", 2, source)
    ranks.expect("check", 2, source)


def test_every_rank_rolls_back(source, start_ranks):
    ranks = start_ranks()
    source.publish(1)
    ranks.expect("refit 60", 1, source)
    old = total(source)
    source.publish(2)
    ranks.expect("refit 60", 2, source)
    for rank in ranks:
        assert rank.do("rollback") == {"version": 1, "sum": pytest.approx(old)}
    assert [said["version"] for said in ranks.all("check")] == [1, 1]


def test_a_commit_alone_gives_up_at_its_deadline_and_keeps_the_version(source, start_ranks):
    ranks = start_ranks()
    source.publish(1)
    ranks.expect("refit 60", 1, source)
    old = total(source)
    source.publish(2)
    ranks[0].do("stage 60")
    said = ranks[0].do("commit 0.5")
    assert (said["error"], said["version"]) == ("CancelledError", 1), said
    assert said["sum"] == pytest.approx(old)
    ranks.expect("refit 60", 2, source)
