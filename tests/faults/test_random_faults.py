"""Rounds of kills and stops at random moments, from a seed: no refit is ever a false success, and
after every round the job goes on."""

from __future__ import annotations

import os
import random

ROUNDS = int(os.environ.get("TRANSFUSE_FAULT_ROUNDS", "10"))
SEED = int(os.environ.get("TRANSFUSE_FAULT_SEED", "20261121"))
AWAY = {"DEADLINE_EXCEEDED", "UNAVAILABLE", "VERSION_GONE", "TORN_READ", "NOT_FOUND"}


class World:
    """Two trainers, two engines, their coordinator, and a die."""

    def __init__(self, job) -> None:
        self.job = job
        self.die = random.Random(SEED)
        spec = self.die.choice(["fsdp:dp=2,dtype=f32", "fsdp:dp=1,replicas=2,dtype=f32"])
        self.trainers = [self.open_trainer(rank, spec) for rank in range(2)]
        self.spec = spec
        self.engines = [self.open_engine(rank) for rank in range(2)]
        self.version = 0

    def open_trainer(self, rank, spec):
        return self.job.trainer(
            f"trainer{rank}",
            spec=spec,
            rank=rank,
            source_count=2,
            drain_ms=100,
            memory=self.die.choice(["heap", "arena"]),
            replaces_dead=True,
        )

    def open_engine(self, rank):
        return self.job.engine(
            f"engine{rank}",
            spec="vllm:tp=2",
            rank=rank,
            verify=self.die.random() < 0.5,
            replaces_dead=True,
        )

    def disturb(self):
        """One fault; returns what ends it."""
        kind = self.die.choice(["trainer", "engine", "coordinator", "nobody"])
        kills = self.die.random() < 0.5
        rank = self.die.randrange(2)
        if kind == "nobody":
            return lambda: None
        if kind == "coordinator":
            coordinator = self.job.coordinator(self.trainers[0])
            if kills:
                coordinator.kill()
                return lambda: None
            coordinator.stop()
            return coordinator.resume
        members = self.trainers if kind == "trainer" else self.engines
        if not kills:
            members[rank].stop()
            return members[rank].resume
        members[rank].kill()

        def replace():
            members[rank] = (
                self.open_trainer(rank, self.spec) if kind == "trainer" else self.open_engine(rank)
            )

        return replace

    def step(self):
        """All trainers publish one version; after a loss it may take another number."""
        for _ in range(20):
            self.version += 1
            sent = [
                (trainer, trainer.send("update", version=self.version, values=self.version))
                for trainer in self.trainers
            ]
            answers = [trainer.answer(number) for trainer, number in sent]
            if all(answer["ok"] for answer in answers):
                return
            for trainer, answer in zip(self.trainers, answers, strict=True):
                if not answer["ok"] and answer["code"] != "ALREADY_EXISTS":
                    trainer.answer(trainer.send("abort"))
        raise AssertionError(f"no version in 20 attempts: {answers}")


def test_random_kills_and_stops_never_end_in_a_false_success(job):
    world = World(job)
    outcomes = []
    for number in range(ROUNDS):
        world.step()
        reads = {}
        for engine in world.engines:
            hold = (world.die.choice(["weights", "words"]), world.die.randrange(1, 4))
            engine.call("hold", what=hold[0], read=hold[1])
            reads[engine] = engine.send("refit", deadline_ms=1000)
        writing = world.die.random() < 0.3
        end = world.disturb()
        for engine in world.engines:
            if not engine.killed:
                engine.go()
        if writing:
            world.version += 1
            for trainer in world.trainers:
                if not trainer.killed:
                    trainer.send("update", version=world.version, values=world.version)
        end()
        for engine in world.engines:
            if engine in reads:
                outcomes.append(engine.expect_outcome(reads[engine], AWAY)["ok"])
        world.step()
        for engine in world.engines:
            answer = engine.refit(kind="at_least", version=world.version, deadline_ms=20000)
            assert answer["version"] == world.version, f"round {number} of seed {SEED}"
    assert any(outcomes)
