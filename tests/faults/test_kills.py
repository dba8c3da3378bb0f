"""Trainer, engine and coordinator, killed and stopped, before, during and after a refit: a typed
error or a correct retry in time, never a false success, and the job goes on."""

from __future__ import annotations

import pytest

MOMENTS = ["before", "during", "after"]
MEMORY = ["heap", "arena"]
HOLD = ("weights", 3)  # some of the weights have come, others have not
# What a refit may end with while its source or its coordinator is away.
AWAY = {"DEADLINE_EXCEEDED", "UNAVAILABLE", "VERSION_GONE", "TORN_READ", "NOT_FOUND"}


def in_time(answer: dict, deadline_ms: int, call_deadline_ms: int = 2000) -> None:
    """A refit may end one call to the coordinator late; a busy machine gets two seconds more."""
    assert answer["elapsed_ms"] < deadline_ms + call_deadline_ms + 2000, answer


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_trainer_is_a_typed_error_until_another_takes_its_place(job, moment, memory):
    trainer = job.trainer(memory=memory)
    engine = job.engine()
    trainer.update(1)
    if moment == "during":
        reading = engine.start_refit(hold=HOLD, deadline_ms=20000)
        trainer.kill()
        engine.go()
        next_one = job.trainer(memory=memory, replaces_dead=True)
        next_one.update(2)
        version = engine.expect_right(reading)["version"]
        # Mapped memory outlives its process: what was read of it is still proved.
        assert version == 2 or memory == "arena"
    else:
        if moment == "after":
            engine.refit()
        trainer.kill()
        failed = engine.answer(engine.send("refit", kind="at_least", version=2, deadline_ms=400))
        assert failed["code"] in AWAY
        in_time(failed, 400)
        assert failed["holds"] == (1 if moment == "after" else 0)
        next_one = job.trainer(memory=memory, replaces_dead=True)
        next_one.update(2)
    assert engine.refit(kind="at_least", version=2)["version"] == 2


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_trainer_is_waited_for_only_until_the_deadline(job, moment, memory):
    trainer = job.trainer(memory=memory)
    engine = job.engine()
    trainer.update(1)
    if moment == "during":
        reading = engine.start_refit(hold=HOLD, deadline_ms=800)
        trainer.stop()
        engine.go()
        in_time(engine.expect_outcome(reading, AWAY), 800)
    elif moment == "before":
        trainer.stop()
        failed = engine.answer(engine.send("refit", deadline_ms=800))
        assert failed["code"] in AWAY
        in_time(failed, 800)
    else:
        engine.refit()
        trainer.stop()
        failed = engine.answer(engine.send("refit", kind="at_least", version=2, deadline_ms=400))
        assert failed["code"] in AWAY
        assert engine.call("check", values=1)["wrong"] == 0
    trainer.resume()
    trainer.update(2)
    assert engine.refit(kind="at_least", version=2)["version"] == 2


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_engine_keeps_no_lease_and_its_successor_gets_the_weights(job, moment):
    trainer = job.trainer(drain_ms=20000)
    engine = job.engine()
    trainer.update(1)
    if moment == "during":
        engine.start_refit(hold=HOLD)
        engine.kill()
    else:
        if moment == "after":
            engine.refit()
        engine.kill()
    written = trainer.update(2)
    assert written["revoked"] == 0
    assert written["elapsed_ms"] < 15000
    assert job.engine(replaces_dead=True).refit()["version"] == 2
    assert [v["leases"] for v in trainer.call("versions")["versions"] if v["version"] == 2] == [0]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_engine_does_not_hold_up_training_and_catches_up(job, moment):
    trainer = job.trainer(drain_ms=200)
    engine = job.engine(member_ttl_ms=20000)
    trainer.update(1)
    if moment == "during":
        reading = engine.start_refit(hold=HOLD, deadline_ms=20000)
        engine.stop()
        written = trainer.update(2)
        assert written["revoked"] == 1  # a lease that is never released ends at the deadline
        assert written["waited_us"] >= 100_000
        engine.resume()
        engine.go()
        answer = engine.expect_right(reading)
        assert answer["version"] == 2
        assert "TORN_READ" in {step["code"] for step in answer["report"]["steps"]}
    else:
        if moment == "after":
            engine.refit()
        engine.stop()
        assert trainer.update(2)["revoked"] == 0
        engine.resume()
    assert engine.refit()["version"] == 2


def test_an_engine_that_was_stopped_beyond_its_time_to_live_joins_again_by_itself(job):
    trainer = job.trainer(drain_ms=20000)
    engine = job.engine(member_ttl_ms=400)
    trainer.update(1)
    reading = engine.start_refit(hold=HOLD, deadline_ms=20000)
    engine.stop()
    written = trainer.update(2)  # when the engine counts as dead, its lease is gone
    assert written["elapsed_ms"] < 15000
    engine.resume()
    engine.go()
    assert engine.expect_right(reading)["version"] == 2
    trainer.update(3)
    assert engine.refit()["version"] == 3


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_coordinator_is_started_again_and_nobody_has_to_do_anything(job, moment):
    trainer = job.trainer()
    engine = job.engine()
    trainer.update(1)
    coordinator = job.coordinator(engine)
    if moment == "during":
        reading = engine.start_refit(hold=HOLD, deadline_ms=20000)
        coordinator.kill()
        engine.go()
        assert engine.expect_right(reading)["version"] == 1
    else:
        if moment == "after":
            engine.refit()
        coordinator.kill()
        assert engine.refit(deadline_ms=20000)["version"] == 1
    trainer.update(2)
    assert engine.refit()["version"] == 2
    assert job.coordinator(engine).epoch > coordinator.epoch
    assert job.coordinator(trainer).pid == job.coordinator(engine).pid


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_coordinator_is_a_typed_error_within_the_deadline(job, moment):
    trainer = job.trainer(call_deadline_ms=700, drain_ms=500)
    engine = job.engine(call_deadline_ms=700)
    trainer.update(1)
    coordinator = job.coordinator(engine)
    if moment == "during":
        reading = engine.start_refit(hold=HOLD, deadline_ms=1000)
        coordinator.stop()
        engine.go()
        in_time(engine.expect_outcome(reading, {"DEADLINE_EXCEEDED", "UNAVAILABLE"}), 1000, 1400)
    else:
        if moment == "after":
            engine.refit()
        coordinator.stop()
        failed = engine.answer(engine.send("refit", deadline_ms=600))
        assert failed["code"] == "DEADLINE_EXCEEDED"
        assert f"process {coordinator.pid}" in failed["message"]
        in_time(failed, 600, 1400)
        if moment == "after":
            assert engine.call("check", values=1)["wrong"] == 0
    failed = trainer.answer(trainer.send("begin_write", version=2))
    assert failed["code"] == "DEADLINE_EXCEEDED"
    in_time(failed, 700)
    coordinator.resume()
    trainer.update(2)
    assert engine.refit(kind="at_least", version=2)["version"] == 2
    assert job.coordinator(engine).pid == coordinator.pid


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_source_that_dies_while_it_writes_never_becomes_a_version(job, how):
    first = job.trainer("trainer0", spec="fsdp:dp=2,dtype=f32", rank=0, source_count=2)
    second = job.trainer("trainer1", spec="fsdp:dp=2,dtype=f32", rank=1, source_count=2)
    engine = job.engine()
    for trainer in (first, second):
        trainer.update(1)
    engine.refit()
    first.update(2)
    second.call("begin_write", version=2)
    if how == "kill":
        second.kill()
    else:
        second.stop()
    failed = engine.answer(engine.send("refit", kind="at_least", version=2, deadline_ms=400))
    assert failed["code"] == "DEADLINE_EXCEEDED"
    assert engine.call("check", values=1)["wrong"] == 0
    if how == "kill":
        second = job.trainer(
            "trainer1", spec="fsdp:dp=2,dtype=f32", rank=1, source_count=2, replaces_dead=True
        )
    else:
        second.resume()
        second.call("abort", reason="the step was lost")
    for trainer in (first, second):
        trainer.update(3)
    assert engine.refit(kind="at_least", version=3)["version"] == 3


@pytest.mark.parametrize("memory", MEMORY)
def test_a_replica_takes_over_from_a_source_that_is_killed_during_the_read(job, memory):
    spec = {"spec": "fsdp:dp=1,replicas=2,dtype=f32", "source_count": 2, "memory": memory}
    trainers = [job.trainer(f"trainer{rank}", rank=rank, **spec) for rank in range(2)]
    engine = job.engine()
    for trainer in trainers:
        trainer.update(1)
    reading = engine.start_refit(hold=HOLD, deadline_ms=20000)
    trainers[0].kill()
    engine.go()
    answer = engine.expect_right(reading)
    assert answer["version"] == 1
    if memory == "heap":
        steps = answer["report"]["steps"]
        assert {(step["code"], step["source"]) for step in steps} == {("UNAVAILABLE", "trainer0")}
        assert answer["report"]["attempts"] == 1


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("who", ["trainer", "engine"])
def test_the_coordinator_and_another_lost_at_once_are_both_survived(job, who, how):
    trainer = job.trainer(drain_ms=200)
    engine = job.engine()
    trainer.update(1)
    coordinator = job.coordinator(engine)
    reading = engine.start_refit(hold=HOLD, deadline_ms=20000)
    lost = trainer if who == "trainer" else engine
    if how == "killed":
        lost.kill()
    else:
        lost.stop()
    coordinator.kill()
    if how == "stopped":
        lost.resume()
    elif who == "trainer":
        trainer = job.trainer(replaces_dead=True)
    else:
        engine = job.engine(replaces_dead=True)
    trainer.update(2)
    if (who, how) != ("engine", "killed"):
        engine.go()
        assert engine.expect_right(reading)["version"] in {1, 2}
    assert engine.refit(kind="at_least", version=2, deadline_ms=20000)["version"] == 2
    assert job.coordinator(engine).epoch > coordinator.epoch
