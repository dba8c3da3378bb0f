"""Engines of several ranks: any of them killed or stopped before, between and after the two phases
of a commit, the coordinator with it, and trainers that die or come back. No rank ever serves a
mixed or half-written engine, everything ends by its deadline, and it is said who is missing."""

from __future__ import annotations

import time

import pytest

SIZE = 3
HOLD = ("weights", 3)  # some of the weights have come, others have not
# Where the rank is when it is lost. Phase one: stage, verify, vote. Phase two: decide, apply.
MOMENTS = ["before", "staging", "between", "decided", "after"]
# Longer than what says that somebody is dead, so that an answer in time is one that is known.
DEADLINE_MS = 10000


class Engine:
    """All ranks of one engine."""

    def __init__(self, job, **options) -> None:
        self.job = job
        self.options = options
        self.ranks = [job.rank(number, SIZE, **options) for number in range(SIZE)]

    def send(self, do: str, **arguments) -> list[int]:
        return [rank.send(do, **arguments) for rank in self.ranks]

    def refit(self, version: int, values: int | None = None) -> None:
        """All ranks, at once; every element of every rank is right afterwards."""
        numbers = self.send("refit", kind="at_least", version=version, deadline_ms=20000)
        for rank, number in zip(self.ranks, numbers, strict=True):
            answer = rank.result(number)
            assert (answer["holds"], answer["version"]) == (version, version)
        self.expect(version, values)

    def expect(self, version: int, values: int | None = None) -> None:
        for rank in self.ranks:
            rank.expect_held(version, values)
            assert rank.call("check_group")["version"] == version

    def replace(self, number: int) -> None:
        self.ranks[number] = self.job.rank(number, SIZE, replaces_dead=True, **self.options)


def commit_outcome(rank, number: int, old: int, new: int) -> str:
    """Ends in time; the parameters hold one whole version, and which one is what was said."""
    answer = rank.answer(number)
    assert answer["elapsed_ms"] < DEADLINE_MS + 4000, answer
    if answer["ok"]:
        rank.expect_held(new)
        return "COMMIT"
    assert answer["code"] in {"CANCELLED", "GROUP_BROKEN"}, answer
    assert answer["holds"] in ({old} if answer["code"] == "CANCELLED" else {old, new}), answer
    rank.expect_held(answer["holds"])
    return answer["code"]


def lose(rank, how: str) -> None:
    rank.kill() if how == "killed" else rank.stop()


def bring_lost_rank_to(engine: Engine, moment: str) -> None:
    """The last rank stands where it will be lost; the others have staged version 2."""
    *others, last = engine.ranks
    if moment == "staging":
        last.call("hold", what=HOLD[0], read=HOLD[1])
        last.send("stage", wait=False, deadline_ms=20000)
        last.wait_held()
    if moment == "between":  # it has voted, another one has not
        assert last.stage() == 2
        assert others[0].stage() == 2
    elif moment in {"decided", "after"}:
        for rank, number in zip(engine.ranks, engine.send("stage"), strict=True):
            assert rank.result(number)["version"] == 2
    else:
        for rank in others:
            assert rank.stage() == 2
    if moment == "after":
        numbers = engine.send("commit", deadline_ms=DEADLINE_MS)
        for rank, number in zip(engine.ranks, numbers, strict=True):
            rank.result(number)
        engine.expect(2)


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rank_that_is_lost_never_leaves_a_mixed_engine_that_serves(job, moment, how):
    trainer = job.trainer(memory="arena", snapshot_slots=2)
    engine = Engine(job)
    *others, last = engine.ranks
    trainer.update(1)
    engine.refit(1)
    trainer.update(2)
    bring_lost_rank_to(engine, moment)
    waiting = {"between": others[:1], "after": []}.get(moment, others)
    numbers = [rank.send("commit", deadline_ms=DEADLINE_MS) for rank in waiting]
    lose(last, how)
    outcomes = {
        commit_outcome(rank, number, 1, 2) for rank, number in zip(waiting, numbers, strict=True)
    }
    if waiting:
        assert outcomes == {"GROUP_BROKEN" if moment == "decided" else "CANCELLED"}
    job.wait_gone("rank2", trainer)
    # Nobody may serve, and it is said why.
    group = trainer.group()
    assert group["state"] == "BROKEN"
    assert "rank2" in group["reason"]
    for rank in others:
        refused = rank.refused("GROUP_BROKEN", "check_group")
        assert "rank2" in refused["message"]
    if how == "stopped":
        last.resume()
        # It was thought dead; whatever it was doing ends, and it takes its place again by itself.
        for _ in range(100):
            if trainer.group()["state"] != "BROKEN":
                break
            time.sleep(0.02)
        if moment == "staging":
            last.go()
            last.answer(last.send("staged", deadline_ms=20000))
    else:
        engine.replace(SIZE - 1)
    trainer.update(3)
    engine.refit(3)
    assert trainer.group()["state"] == "WHOLE"


@pytest.mark.parametrize("moment", ["staging", "between", "decided"])
def test_a_rank_and_the_coordinator_killed_together(job, moment):
    trainer = job.trainer(memory="arena", snapshot_slots=2)
    engine = Engine(job)
    *others, last = engine.ranks
    trainer.update(1)
    engine.refit(1)
    trainer.update(2)
    bring_lost_rank_to(engine, moment)
    coordinator = job.coordinator(trainer)
    last.kill()
    coordinator.kill()
    waiting = others[:1] if moment == "between" else others
    numbers = [rank.send("commit", deadline_ms=3000) for rank in waiting]
    for rank, number in zip(waiting, numbers, strict=True):
        assert commit_outcome(rank, number, 1, 2) != "COMMIT"
    engine.replace(SIZE - 1)
    trainer.update(3)
    engine.refit(3)
    assert trainer.group()["state"] == "WHOLE"
    assert job.coordinator(trainer).epoch > coordinator.epoch


def test_the_coordinator_killed_between_the_phases_of_a_living_group(job):
    trainer = job.trainer(memory="arena", snapshot_slots=2)
    engine = Engine(job)
    trainer.update(1)
    engine.refit(1)
    for version in (2, 3, 4):
        trainer.update(version)
        for rank in engine.ranks:
            assert rank.stage() == version
        job.coordinator(trainer).kill()
        numbers = engine.send("commit", deadline_ms=20000)
        outcomes = {
            commit_outcome(rank, number, version - 1, version)
            for rank, number in zip(engine.ranks, numbers, strict=True)
        }
        assert len(outcomes) == 1, outcomes
        if outcomes == {"COMMIT"}:
            engine.expect(version)
        engine.refit(version)


@pytest.mark.parametrize("slots", [0, 2], ids=["in_place", "snapshot"])
def test_a_trainer_killed_with_a_version_half_published(job, slots):
    options = {"spec": "fsdp:dp=2,dtype=f32", "source_count": 2, "snapshot_slots": slots}
    trainers = [job.trainer(f"trainer{i}", rank=i, **options) for i in range(2)]
    engine = Engine(job)
    for trainer in trainers:
        trainer.update(1)
    engine.refit(1)
    trainers[0].update(2)
    trainers[1].call("begin_write", version=2)
    numbers = engine.send("stage", kind="at_least", version=2, deadline_ms=1500)
    trainers[1].kill()
    for rank, number in zip(engine.ranks, numbers, strict=True):
        answer = rank.answer(number)
        assert answer["code"] in {"DEADLINE_EXCEEDED", "VERSION_GONE", "CANCELLED"}, answer
        rank.expect_held(1)
    job.wait_gone("trainer1", trainers[0])
    second = {v["version"]: v for v in trainers[0].call("versions")["versions"]}[2]
    if slots == 0:
        assert second["state"] == "ABORTED"
        assert "trainer1" in second["reason"]
    else:  # taking a snapshot is not known to anybody before it is published
        assert second["state"] == "OPEN"
    engine.expect(1)
    trainers[1] = job.trainer("trainer1", rank=1, replaces_dead=True, **options)
    for trainer in trainers:
        trainer.update(3)
    engine.refit(3)


def test_a_trainer_that_comes_back_with_older_weights_under_a_new_number(job):
    trainer = job.trainer(memory="arena", snapshot_slots=2)
    engine = Engine(job)
    for version in (1, 2):
        trainer.update(version)
        engine.refit(version)
    trainer.kill()
    again = job.trainer(memory="arena", snapshot_slots=2, replaces_dead=True)
    again.update(3, values=1)  # from a checkpoint
    engine.refit(3, values=1)
    assert again.group()["state"] == "WHOLE"


def test_a_trainer_restarted_with_another_sharding_needs_no_restart_of_the_engine(job):
    engine = Engine(job)
    whole = job.trainer("trainer0", spec="fsdp:dp=1,dtype=f32", snapshot_slots=2)
    whole.update(1)
    engine.refit(1)
    whole.kill()
    halves = [
        job.trainer(
            f"half{i}",
            spec="fsdp:dp=2,dtype=f32",
            rank=i,
            source_count=2,
            snapshot_slots=2,
            replaces_dead=True,
        )
        for i in range(2)
    ]
    for trainer in halves:
        trainer.update(2)
    engine.refit(2)


def test_an_engine_grows_from_one_rank_to_two_while_another_goes_on(job):
    trainer = job.trainer(memory="arena", snapshot_slots=2)
    alone = job.engine("alone", into="shadow")
    small = job.rank(0, 1, spec="vllm:tp=1")
    trainer.update(1)
    assert small.refit()["version"] == 1
    assert alone.refit()["version"] == 1
    assert small.close() == 0
    grown = [job.rank(i, 2, spec="vllm:tp=2", rank=i) for i in range(2)]
    trainer.update(2)
    numbers = [rank.send("refit", deadline_ms=20000) for rank in grown]
    for rank, number in zip(grown, numbers, strict=True):
        rank.expect_right(number)
    assert trainer.group()["version"] == 2
    assert alone.refit()["version"] == 2


def test_in_place_has_no_none_and_says_so(job):
    trainer = job.trainer(memory="arena", snapshot_slots=2)
    engine = Engine(job, into="in_place")
    *others, last = engine.ranks
    trainer.update(1)
    engine.refit(1)
    trainer.update(2)
    last.call("hold", what=HOLD[0], read=HOLD[1])
    number = last.send("refit", deadline_ms=20000)
    last.wait_held()
    numbers = [rank.send("refit", deadline_ms=3000) for rank in others]
    time.sleep(0.2)
    last.kill()
    for rank, each in zip(others, numbers, strict=True):
        answer = rank.answer(each)
        assert not answer["ok"]
        assert answer["holds"] == 0, "its parameters were overwritten: it says that it has none"
        rank.refused("GROUP_BROKEN", "check_group")
    del number
    engine.replace(SIZE - 1)
    engine.refit(2)
