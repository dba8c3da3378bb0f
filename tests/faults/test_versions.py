"""A source that does not stand still while it is read: one version, whole, or a typed error."""

from __future__ import annotations

import pytest

IN_WEIGHTS = ("weights", 3)  # some of the weights have come, others have not
BEFORE_FIRST_GENERATION = ("words", 1)
BEFORE_SECOND_GENERATION = ("words", 2)  # every weight has come


def codes(answer):
    return [step["code"] for step in answer["report"]["steps"]]


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("memory", ["heap", "arena"])
@pytest.mark.parametrize("moment", [IN_WEIGHTS, BEFORE_SECOND_GENERATION])
def test_a_write_during_the_read_is_torn_and_the_next_version_arrives(job, moment, memory, verify):
    trainer = job.trainer(drain_ms=50, memory=memory)
    engine = job.engine(verify=verify)
    trainer.update(1)
    reading = engine.start_refit(hold=moment, deadline_ms=20000)
    assert trainer.call("begin_write", version=2)["revoked"] == 1
    trainer.call("write", version=2)
    engine.go()
    trainer.call("publish", version=2)
    answer = engine.expect_right(reading)
    assert answer["version"] == 2
    assert "TORN_READ" in codes(answer)
    assert answer["report"]["attempts"] >= 2


def test_a_source_that_is_at_the_next_version_before_the_read_begins_is_noticed(job):
    trainer = job.trainer(drain_ms=50)
    engine = job.engine(verify=False)
    trainer.update(1)
    reading = engine.start_refit(hold=BEFORE_FIRST_GENERATION, deadline_ms=20000)
    assert trainer.update(2)["revoked"] == 1
    engine.go()
    answer = engine.expect_right(reading)
    assert answer["version"] == 2
    assert codes(answer)[0] == "TORN_READ"
    # Warm: the connection and the plan are those of the cycle before.
    reading = engine.start_refit(hold=BEFORE_FIRST_GENERATION, deadline_ms=20000)
    assert trainer.update(3)["revoked"] == 1
    engine.go()
    assert engine.expect_right(reading)["version"] == 3


def test_one_source_that_moves_on_does_not_mix_versions_of_two(job):
    spec = {"spec": "fsdp:dp=2,dtype=f32", "source_count": 2, "drain_ms": 50}
    trainers = [job.trainer(f"trainer{rank}", rank=rank, **spec) for rank in range(2)]
    engine = job.engine(verify=False)
    for trainer in trainers:
        trainer.update(1)
    reading = engine.start_refit(hold=IN_WEIGHTS, deadline_ms=20000)
    assert trainers[1].update(2)["revoked"] == 1
    engine.go()
    assert trainers[0].update(2)["revoked"] == 0  # the lease had ended
    answer = engine.expect_right(reading)
    assert answer["version"] == 2
    assert "TORN_READ" in codes(answer)


def test_exactly_a_version_that_ends_during_the_read_is_an_error_and_no_version_is_held(job):
    trainer = job.trainer(drain_ms=50)
    engine = job.engine()
    trainer.update(1)
    reading = engine.start_refit(hold=IN_WEIGHTS, kind="exactly", version=1, deadline_ms=20000)
    trainer.update(2)
    engine.go()
    answer = engine.answer(reading)
    assert answer["code"] == "VERSION_GONE"
    assert answer["holds"] == 0
    assert "2" in engine.refused("VERSION_GONE", "refit", kind="exactly", version=1)["message"]
    assert engine.refit(kind="exactly", version=2)["version"] == 2


def test_an_engine_that_lives_and_never_releases_its_lease_is_revoked_at_the_deadline(job):
    trainer = job.trainer(drain_ms=300)
    engine = job.engine(verify=False)
    trainer.update(1)
    reading = engine.start_refit(hold=IN_WEIGHTS, deadline_ms=20000)
    written = trainer.update(2)
    assert written["revoked"] == 1
    assert written["waited_us"] >= 150_000
    assert written["elapsed_ms"] < 10000
    engine.go()
    assert engine.expect_right(reading)["version"] == 2


def test_a_cancelled_refit_returns_its_lease(job):
    trainer = job.trainer(drain_ms=20000)
    engine = job.engine()
    trainer.update(1)
    reading = engine.start_refit(hold=IN_WEIGHTS)
    engine.send("cancel")
    engine.go()
    answer = engine.answer(reading)
    assert answer["code"] == "CANCELLED"
    assert answer["holds"] == 0
    assert trainer.update(2)["revoked"] == 0
    assert engine.stats()["tickets"] == 0
    assert engine.refit()["version"] == 2


def test_an_aborted_version_is_never_seen_and_the_next_one_is(job):
    trainer = job.trainer()
    engine = job.engine()
    trainer.update(1)
    engine.refit()
    trainer.call("begin_write", version=2)
    trainer.call("write", version=2)
    trainer.call("abort", reason="loss is not a number")
    failed = engine.refused("DEADLINE_EXCEEDED", "refit", deadline_ms=300)
    assert failed["holds"] == 1
    assert engine.call("check", values=1)["wrong"] == 0
    gone = engine.refused("VERSION_GONE", "refit", kind="exactly", version=2, deadline_ms=300)
    assert "loss is not a number" in gone["message"]
    trainer.update(3)
    assert engine.refit()["version"] == 3


def test_a_version_is_published_once(job):
    trainer = job.trainer()
    engine = job.engine()
    trainer.update(5)
    engine.refit()
    for version in (5, 4):
        refused = trainer.refused("ALREADY_EXISTS", "begin_write", version=version)
        assert "version 5" in refused["message"]
    assert "begin_write" in trainer.refused("INVALID_ARGUMENT", "publish", version=5)["message"]
    trainer.refused("INVALID_ARGUMENT", "begin_write", version=0)
    # None of it has harmed what is offered.
    assert engine.refit(kind="exactly", version=5)["version"] == 5
    trainer.update(6)
    assert engine.refit()["version"] == 6


# -- restarts --


def test_a_trainer_restarted_at_the_same_addresses_is_another_source(job):
    trainer = job.trainer(memory="fixed")
    engine = job.engine()
    trainer.update(1)
    engine.refit()
    trainer.kill()
    restarted = job.trainer(memory="fixed", replaces_dead=True)
    restarted.update(1, values=77)
    # The same name, number, addresses and even counter: only the incarnation differs.
    answer = engine.refit(values=77)
    assert answer["version"] == 1
    assert not answer["report"]["planned"]  # the layout is the same


@pytest.mark.parametrize("moment", [IN_WEIGHTS, BEFORE_SECOND_GENERATION])
def test_a_restart_at_the_same_addresses_during_the_read_mixes_nothing(job, moment):
    trainer = job.trainer(memory="fixed")
    engine = job.engine(verify=False)
    trainer.update(1)
    reading = engine.start_refit(hold=moment, deadline_ms=20000)
    trainer.kill()
    restarted = job.trainer(memory="fixed", replaces_dead=True)
    restarted.update(1, values=77)
    engine.go()
    answer = engine.result(reading)
    wrong = [engine.call("check", values=values)["wrong"] for values in (1, 77)]
    assert answer["version"] == 1
    assert 0 in wrong  # one or the other, whole
    assert engine.refit(values=77)["version"] == 1


@pytest.mark.parametrize("memory", ["heap", "arena"])
def test_a_publisher_opened_again_on_the_same_memory_is_another_source(job, memory):
    trainer = job.trainer(memory=memory)
    engine = job.engine(verify=False)
    trainer.update(1)
    reading = engine.start_refit(hold=IN_WEIGHTS, deadline_ms=20000)
    trainer.call("close_publisher")
    trainer.call("publisher", name="trainer0", same_memory=True)
    trainer.update(1, values=88)
    engine.go()
    assert engine.expect_right(reading, values=88)["version"] == 1
    assert engine.stats()["remote_regions"] <= 16


def test_trainers_that_come_back_with_another_sharding_are_planned_anew(job):
    trainer = job.trainer()
    engine = job.engine()
    trainer.update(1)
    assert engine.refit()["report"]["planned"]
    trainer.kill()
    job.wait_gone("trainer0", asked=engine)  # its version with it: numbers may begin again
    spec = {"spec": "fsdp:dp=2,dtype=f32", "source_count": 2}
    for rank in range(2):
        job.trainer(f"rank{rank}", rank=rank, **spec).update(1, values=9)
    answer = engine.refit(values=9)
    assert answer["report"]["planned"]
    assert any("replan" in step["what"] for step in answer["report"]["steps"])


def test_a_trainer_that_slept_while_another_took_its_name_is_told_so(job):
    sleeper = job.trainer(member_ttl_ms=400)
    engine = job.engine()
    sleeper.update(1)
    engine.refit()
    sleeper.stop()
    successor = job.trainer(replaces_dead=True)
    successor.update(1, values=50)
    sleeper.resume()
    refused = sleeper.refused("ALREADY_EXISTS", "update", version=2)
    assert "trainer0" in refused["message"]
    assert engine.refit(values=50)["version"] == 1
    successor.update(2)
    assert engine.refit()["version"] == 2


def test_a_name_belongs_to_one_living_member(job):
    trainer = job.trainer()
    engine = job.engine()
    trainer.update(1)
    other = job.start().connect()
    refused = other.refused(
        "ALREADY_EXISTS", "publisher", name="trainer0", spec="fsdp:dp=1,dtype=f32"
    )
    assert "trainer0" in refused["message"]
    refused = other.refused("ALREADY_EXISTS", "receiver", name="engine0", spec="hf")
    assert "engine0" in refused["message"]
    one_too_many = other.refused(
        "ALREADY_EXISTS", "publisher", name="trainer1", spec="fsdp:dp=1,dtype=f32"
    )
    assert "trainer0" in one_too_many["message"]
    assert other.stats()["regions"] == 0  # a refused member keeps nothing registered
    assert engine.refit()["version"] == 1
    trainer.update(2)
    assert engine.refit()["version"] == 2
