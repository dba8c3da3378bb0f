"""Trainers that are killed in the middle of a refit, and the checkpoint that is left of them."""

from __future__ import annotations

from pathlib import Path

import pytest

HOLD = ("weights", 3)  # some of the weights have come, others have not
TRAINER_SPEC = "fsdp:dp=1,dtype=f32"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder for a checkpoint."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    return folder


def options(saved: Path) -> dict[str, object]:
    return {"checkpoint": str(saved), "checkpoint_spec": TRAINER_SPEC}


def codes(answer: dict) -> list[str]:
    return [step["code"] for step in answer["report"]["steps"]]


def from_checkpoint(answer: dict, saved: Path) -> None:
    """Every byte came from the files, was proved, and how it came to that is in the steps."""
    report = answer["report"]
    assert report["checkpoint"] == str(saved)
    assert {route["transport"] for route in report["routes"]} == {"file"}
    assert report["verified_bytes"] == report["size_bytes"]
    assert "next: checkpoint" in report["steps"][-1]["what"], report["steps"]


@pytest.mark.parametrize("into", ["in_place", "shadow"])
def test_a_trainer_that_is_killed_midway_is_followed_by_its_checkpoint(job, saved, into):
    trainer = job.trainer()
    engine = job.engine(into=into, **options(saved))
    trainer.update(1)
    engine.refit()
    trainer.update(2)
    trainer.call("save", path=str(saved), version=2)
    trainer.update(3)
    reading = engine.start_refit(hold=HOLD, deadline_ms=20000)
    trainer.kill()
    engine.go()
    answer = engine.expect_right(reading)
    assert answer["version"] == 2, "as the checkpoint says, not as the trainer was at"
    from_checkpoint(answer, saved)
    assert codes(answer)[0] == "UNAVAILABLE", "the source itself, first"
    # A trainer again: the checkpoint is history.
    job.trainer(replaces_dead=True).update(4)
    assert engine.refit(kind="at_least", version=4)["report"]["checkpoint"] == ""


def test_a_stopped_trainer_leaves_time_for_the_checkpoint(job, saved):
    trainer = job.trainer()
    engine = job.engine(**options(saved))
    trainer.update(1)
    trainer.call("save", path=str(saved), version=1)
    trainer.call("begin_write", version=2)  # and never goes on
    trainer.stop()
    answer = engine.refit(deadline_ms=15000)
    from_checkpoint(answer, saved)
    assert answer["version"] == 1
    trainer.resume()


def test_first_weights_of_an_engine_without_any_trainer(job, saved):
    writer = job.trainer()
    writer.call("write", values=9)
    writer.call("save", path=str(saved), version=9)
    writer.call("close_publisher")
    ranks = [job.rank(number, spec="vllm:tp=2", rank=number, **options(saved)) for number in (0, 1)]
    started = [rank.start_refit(deadline_ms=20000) for rank in ranks]
    for rank, number in zip(ranks, started, strict=True):
        answer = rank.expect_right(number)
        assert answer["version"] == 9
        from_checkpoint(answer, saved)
    assert ranks[0].group()["state"] == "WHOLE"
    assert ranks[0].group()["version"] == 9


def test_ranks_whose_trainer_is_killed_midway_load_the_checkpoint_together(job, saved):
    trainer = job.trainer()
    trainer.update(3)
    trainer.call("save", path=str(saved), version=3)
    ranks = [
        job.rank(number, into="in_place", spec="vllm:tp=2", rank=number, **options(saved))
        for number in (0, 1)
    ]
    held = ranks[0].start_refit(hold=HOLD, deadline_ms=20000)
    other = ranks[1].start_refit(deadline_ms=20000)
    trainer.kill()
    ranks[0].go()
    for rank, number in ((ranks[0], held), (ranks[1], other)):
        answer = rank.expect_right(number)
        assert answer["version"] == 3
        from_checkpoint(answer, saved)
    assert ranks[1].group()["state"] == "WHOLE"


def test_an_engine_that_is_killed_while_it_reads_a_checkpoint_leaves_nothing(job, saved):
    writer = job.trainer()
    writer.call("write", values=9)
    writer.call("save", path=str(saved), version=9)
    engine = job.engine(checkpoint_wait_ms=0, **options(saved))
    engine.send("refit", kind="at_least", version=9)
    engine.kill()
    successor = job.engine(replaces_dead=True, **options(saved))
    assert successor.refit(kind="at_least", version=9)["version"] == 9
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "rank0.safetensors"]
