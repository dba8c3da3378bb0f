"""Trainers that copy a snapshot behind their back, and what can happen meanwhile: readers see whole
versions or none, and the trainer is told."""

from __future__ import annotations

import time

import pytest

COPYING, PUBLISHED = 1, 2
SLOW = {
    "memory": "arena",
    "snapshot_slots": 2,
    "snapshot_async": True,
    "snapshot_gbs": 1e-4,  # two thirds of a second for the small model
}
AWAY = {"DEADLINE_EXCEEDED", "UNAVAILABLE", "VERSION_GONE", "TORN_READ", "NOT_FOUND"}


def begin_copy(trainer, version: int) -> None:
    """Returns when some of the version is copied, and some is not."""
    assert trainer.update(version)["copying"]
    while trainer.call("snapshot")["copied_bytes"] == 0:
        time.sleep(0.005)
    assert trainer.call("snapshot")["state"] == COPYING


def published(trainer, version: int) -> None:
    answer = trainer.call("wait_published", deadline_ms=20000)
    assert (answer["state"], answer["version"]) == (PUBLISHED, version)


def test_a_trainer_that_is_killed_while_it_copies_leaves_no_trace_of_the_version(job):
    trainer, engine = job.trainer(**SLOW), job.engine()
    trainer.update(1)
    published(trainer, 1)
    assert engine.refit()["version"] == 1
    begin_copy(trainer, 2)
    waiting = engine.send("refit", kind="at_least", version=2, deadline_ms=1500)
    trainer.kill()
    failed = engine.answer(waiting)
    assert failed["code"] in AWAY, failed
    engine.expect_held(1)
    next_one = job.trainer(replaces_dead=True, **SLOW)
    next_one.update(2, values=7)
    assert engine.refit(kind="at_least", version=2, values=7, deadline_ms=20000)["version"] == 2


def test_a_trainer_that_stands_still_while_it_copies_is_waited_for(job):
    trainer, engine = job.trainer(**SLOW), job.engine()
    begin_copy(trainer, 1)
    trainer.stop()
    failed = engine.answer(engine.send("refit", deadline_ms=300))
    assert failed["code"] in AWAY, failed
    trainer.resume()
    assert engine.refit(deadline_ms=20000)["version"] == 1


def test_a_coordinator_that_is_killed_while_a_trainer_copies(job):
    trainer, engine = job.trainer(**SLOW), job.engine()
    begin_copy(trainer, 1)
    job.coordinator(trainer).kill()
    answer = trainer.answer(trainer.send("wait_published", deadline_ms=20000))
    if not answer["ok"]:
        assert answer["code"] in AWAY, answer
        trainer.call("publish", version=1)
        published(trainer, 1)
    assert engine.refit(deadline_ms=20000)["version"] == 1


@pytest.mark.parametrize("end", ["publish", "abort"])
def test_a_child_that_is_forked_while_its_parent_copies_is_inert(job, end):
    trainer, engine = job.trainer(**SLOW), job.engine()
    begin_copy(trainer, 1)
    forked = trainer.call("fork")
    assert forked["status"] == 0, forked
    assert set(forked["codes"].values()) == {"UNAVAILABLE"}, forked
    if end == "abort":
        trainer.call("abort")
        trainer.update(2)
    version = 2 if end == "abort" else 1
    published(trainer, version)
    assert engine.refit()["version"] == version


def test_a_trainer_that_closes_while_it_copies_ends_in_time(job):
    trainer, engine = job.trainer(**(SLOW | {"snapshot_gbs": 1e-6, "drain_ms": 100})), job.engine()
    begin_copy(trainer, 1)
    trainer.refused("DEADLINE_EXCEEDED", "begin_write", version=2)
    trainer.refused("DEADLINE_EXCEEDED", "close_publisher")
    failed = engine.answer(engine.send("refit", deadline_ms=300))
    assert failed["code"] in AWAY, failed
