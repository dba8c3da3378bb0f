"""Nothing grows: not over refits, not over engines that come and go, not by a fork, and when all
have left nothing is there."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

REFITS = 300
WARM = 100
# Allocators round and gRPC keeps pools: far below what 200 refits would leave at 1 KiB each.
HEAP_SLACK = 128 << 10
RESIDENT_SLACK = 2 << 20
COUNTS = ("descriptors", "threads", "regions", "region_bytes", "peers", "remote_regions", "tickets")


def resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_i3_refits_leave_descriptors_registrations_and_memory_as_they_were(job):
    trainer = job.trainer(memory="heap")
    engine = job.engine(spec="vllm:tp=1")
    coordinator = job.coordinator(engine)
    before = {}
    for version in range(1, REFITS + 1):
        trainer.update(version)
        assert engine.refit()["version"] == version
        if version == WARM:
            before = {member: member.stats() for member in (trainer, engine)}
            coordinator_before = (coordinator.descriptors(), resident_bytes(coordinator.pid))
    for member, warm in before.items():
        now = member.stats()
        assert {name: now[name] for name in COUNTS} == {name: warm[name] for name in COUNTS}
        assert now["poisoned_bytes"] == 0
        assert now["heap_bytes"] - warm["heap_bytes"] < HEAP_SLACK
        assert now["resident_bytes"] - warm["resident_bytes"] < RESIDENT_SLACK
    assert coordinator.descriptors() == coordinator_before[0]
    assert resident_bytes(coordinator.pid) - coordinator_before[1] < RESIDENT_SLACK
    assert len(trainer.call("versions")["versions"]) <= 66  # finished ones are forgotten


def test_twenty_engines_come_and_go_by_every_door(job):
    trainer = job.trainer()
    trainer.update(1)
    first = job.engine("first")
    first.refit()
    coordinator = job.coordinator(trainer)
    order = random.Random(20261121)
    counts = ("descriptors", "regions", "peers", "tickets")
    before = None
    version = 1
    for number in range(20):
        engine = job.engine(f"engine{number}", spec=order.choice(["hf", "vllm:tp=1"]))
        assert engine.refit()["version"] == version
        if number % 3 == 0:
            engine.kill()
        elif number % 3 == 1:
            engine.call("close_receiver")
            engine.close()
        else:
            engine.close()
        job.wait_gone(f"engine{number}", asked=trainer)
        if number % 4 == 3:
            version += 1
            trainer.update(version)
            first.refit()
        if number == 2:  # both plans have their tables
            before = {name: trainer.stats()[name] for name in counts}
            coordinator_before = coordinator.descriptors()
    assert {name: trainer.stats()[name] for name in counts} == before
    assert coordinator.descriptors() <= coordinator_before
    assert {each["name"] for each in trainer.call("members")["members"]} == {"trainer0", "first"}


def test_a_forked_child_is_inert_and_its_parent_goes_on(job):
    trainer = job.trainer(memory="arena")
    engine = job.engine()
    trainer.update(1)
    engine.refit()
    for member in (trainer, engine):
        forked = member.call("fork")
        assert forked["status"] == 0, forked
        assert set(forked["codes"].values()) == {"UNAVAILABLE"}, forked
        assert len(forked["codes"]) >= 3
    assert engine.refit(kind="exactly", version=1)["version"] == 1  # nothing was taken back
    trainer.update(2)
    assert engine.refit()["version"] == 2


def test_a_child_that_is_forked_during_a_refit_harms_nothing(job):
    trainer = job.trainer(memory="heap")
    engine = job.engine()
    trainer.update(1)
    reading = engine.start_refit(hold=("weights", 3), deadline_ms=20000)
    assert trainer.call("fork")["status"] == 0
    engine.go()
    assert engine.expect_right(reading)["version"] == 1


def test_an_idle_coordinator_ends_and_leaves_no_file(job):
    trainer = job.trainer(idle_exit_ms=200)
    engine = job.engine(idle_exit_ms=200)
    trainer.update(1)
    engine.refit()
    coordinator = job.coordinator(engine)
    assert engine.close() == 0
    assert trainer.close() == 0
    coordinator.wait()
    assert job.files() == []
    assert not job.folder.exists()


def test_an_idle_coordinator_whose_folder_cannot_be_made_again_ends(job):
    outer, job.folder = job.folder, job.folder / "inner"
    trainer = job.trainer(idle_exit_ms=200)
    trainer.update(1)
    coordinator = job.coordinator(trainer)
    shutil.rmtree(outer)
    assert trainer.close() == 0
    coordinator.wait()
