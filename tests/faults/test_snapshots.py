"""Readers that die, stand still or are slow, while the trainer publishes snapshots; and clocks that
jump. The trainer goes on as it was told, and nobody ever sees a byte of another version."""

from __future__ import annotations

import mmap
import os
import time

import pytest

REVOKE_AT_DEADLINE, WAIT, REVOKE, SKIP = range(4)
HOLD = ("weights", 3)
# How long the slow reader is watched; TRANSFUSE_SLOW_READER_S=180 for minutes.
SLOW_READER_S = float(os.environ.get("TRANSFUSE_SLOW_READER_S", "3"))


def reader_of_each_slot(job, trainer, slots: int) -> list:
    """As many engines as slots, each in the middle of reading another version."""
    readers = []
    for version in range(1, slots + 1):
        trainer.update(version)
        reader = job.engine(f"reader{version}")
        reader.start_refit(hold=HOLD, deadline_ms=20000)
        readers.append(reader)
    return readers


@pytest.mark.parametrize("policy", [REVOKE_AT_DEADLINE, WAIT, REVOKE, SKIP])
def test_slots_that_dead_readers_have_leased_are_free_again(job, policy):
    trainer = job.trainer(memory="arena", snapshot_slots=2, when_leased=policy, drain_ms=20000)
    engine = job.engine()
    for number, reader in enumerate(reader_of_each_slot(job, trainer, 2), 1):
        reader.kill()
        job.wait_gone(f"reader{number}", trainer)
    for version in (3, 4, 5):
        answer = trainer.update(version)
        assert not answer["skipped"]
        assert answer["publish_revoked"] == 0, "their leases had ended with them"
        assert engine.refit()["version"] == version


@pytest.mark.parametrize("policy", [REVOKE_AT_DEADLINE, WAIT, REVOKE, SKIP])
def test_when_readers_that_stand_still_hold_every_slot_the_trainer_does_as_it_was_told(job, policy):
    trainer = job.trainer(memory="arena", snapshot_slots=2, when_leased=policy, drain_ms=400)
    readers = reader_of_each_slot(job, trainer, 2)
    trainer.call("begin_write", version=3)
    trainer.call("write", values=3)
    start = time.monotonic()
    answer = trainer.answer(trainer.send("publish", version=3))
    waited_s = time.monotonic() - start
    if policy == WAIT:
        assert answer["code"] == "DEADLINE_EXCEEDED"
        readers[0].go()  # the oldest makes room
        time.sleep(0.2)
        trainer.call("publish", version=3)
    elif policy == SKIP:
        assert answer["skipped"]
    else:
        assert answer["publish_revoked"] == 1
        assert waited_s >= (0.4 if policy == REVOKE_AT_DEADLINE else 0)
    for reader in readers:
        reader.go()
        # Revoked or not: what it ends with is right, or a typed error.
        reader.expect_outcome(1 + 2 + 1, {"VERSION_GONE", "TORN_READ", "DEADLINE_EXCEEDED"})
    engine = job.engine()
    newest = 2 if policy == SKIP else 3
    assert engine.refit()["version"] == newest


@pytest.mark.parametrize("policy", [REVOKE, SKIP])
def test_a_receiver_slower_than_the_publisher(job, policy):
    """A stage takes many publish periods; every one that lands is whole, and time goes forward."""
    trainer = job.trainer(memory="arena", snapshot_slots=2, when_leased=policy)
    engine = job.engine(into="shadow")
    end = time.monotonic() + SLOW_READER_S
    landed, published, skipped, version = [], 0, 0, 0
    staging = None
    while time.monotonic() < end:
        version += 1
        answer = trainer.update(version)
        skipped += answer["skipped"]
        published += not answer["skipped"]
        if staging is None:
            # About 40 ms for the small model of the tests.
            staging = engine.send("stage", deadline_ms=20000, max_gbs=0.004)
        time.sleep(0.005)
        if version % 25 == 0:
            answer = engine.answer(staging)
            staging = None
            if answer["ok"]:
                committed = engine.call("commit")["version"]
                engine.expect_held(committed)
                landed.append(committed)
            else:
                assert answer["code"] in {"TORN_READ", "VERSION_GONE", "DEADLINE_EXCEEDED"}, answer
                if landed:
                    engine.expect_held(landed[-1])
    if staging is not None:
        engine.answer(staging)
    assert landed == sorted(set(landed))
    assert published > len(landed) > 0
    if policy == REVOKE:
        assert skipped == 0
    # Once the publisher rests, the newest one lands.
    trainer.update(version + 1)
    assert engine.refit()["version"] == version + 1


class WallClock:
    """The wall clock of every process of a job, ahead by as many seconds as it is told."""

    def __init__(self, job) -> None:
        path = job.log_folder / "clock"
        path.write_bytes(bytes(8))
        self._file = path.open("r+b")
        self._memory = mmap.mmap(self._file.fileno(), 8)
        library = job.build / "tests" / "libtransfuse_clock_shift.so"
        assert library.exists(), library
        job.environment |= {"LD_PRELOAD": str(library), "TRANSFUSE_TEST_CLOCK": str(path)}

    def set(self, ahead_s: int) -> None:
        self._memory[:] = ahead_s.to_bytes(8, "little", signed=True)


@pytest.mark.parametrize("jump_s", [86400, -86400], ids=["ahead", "back"])
def test_clocks_that_jump_end_no_wait_and_no_lease(job, jump_s):
    clock = WallClock(job)
    trainer = job.trainer(memory="arena", snapshot_slots=2)
    ranks = [job.rank(number, 2) for number in range(2)]
    trainer.update(1)
    for rank in ranks:
        rank.call("hold", what=HOLD[0], read=HOLD[1])
    reading = [rank.send("refit", deadline_ms=20000) for rank in ranks]
    for rank in ranks:
        rank.wait_held()
    clock.set(jump_s)
    time.sleep(1.5)  # longer than a member that is silent may live
    assert abs(trainer.stats()["wall_s"] - time.time() - jump_s) < 60, "it has jumped"
    # A busy machine may silence members for longer than they may live; they come back.
    everybody = {"trainer0", "rank0", "rank1"}
    until = time.monotonic() + 10
    while {each["name"] for each in trainer.call("members")["members"]} != everybody:
        assert time.monotonic() < until, "members are gone"
        time.sleep(0.1)
    clock.set(0)
    time.sleep(0.3)
    for rank in ranks:
        rank.go()
    for rank, number in zip(ranks, reading, strict=True):
        assert rank.expect_right(number)["version"] == 1
    waiting = [rank.send("refit", kind="at_least", version=2, deadline_ms=20000) for rank in ranks]
    clock.set(jump_s)
    time.sleep(0.3)
    trainer.update(2)
    for rank, number in zip(ranks, waiting, strict=True):
        assert rank.expect_right(number)["version"] == 2
    assert trainer.group()["state"] == "WHOLE"
    failed = ranks[0].answer(ranks[0].send("refit", kind="at_least", version=9, deadline_ms=500))
    assert failed["code"] == "DEADLINE_EXCEEDED"
    assert 400 <= failed["elapsed_ms"] < 4500
