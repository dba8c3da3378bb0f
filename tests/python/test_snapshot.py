"""Snapshots from Python: the trainer goes on, readers see exactly what was published."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
import transfuse
from transfuse import Retention, SnapshotState, VersionState, WhenLeased, hf, torch_optimizer


def module(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32))


def fill(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()


def values(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(expected, model):
    return all(torch.equal(a, b) for a, b in zip(expected, model.parameters(), strict=True))


def publisher(model, job, **options):
    options = {"retention": "snapshot", "snapshot_slots": 2} | options
    return transfuse.Publisher(*hf.layout(model), name="trainer0", job=job, **options)


def receiver(model, job, name="engine0", **options):
    return transfuse.Receiver(*hf.layout(model), name=name, job=job, **options)


def test_weights_may_change_at_once_and_the_version_does_not(job):
    source, target = module(), module(seed=1)
    with publisher(source, job) as trainer, receiver(target, job) as engine:
        for version in (1, 2, 3):
            trainer.begin_write(version)
            fill(source)
            timing = trainer.publish(version)
            assert timing.copy_us > 0
            assert (timing.skipped, timing.revoked) == (False, 0)
            published = values(source)
            fill(source)  # half of the next step
            report = engine.refit(exactly=version, timeout_s=30)
            assert same(published, target)
            assert report.verified_bytes == report.size_bytes
            assert {route.route for route in report.routes} == {"memfd"}


def test_two_versions_are_readable_side_by_side(job):
    source, target = module(), module(seed=1)
    with publisher(source, job) as trainer, receiver(target, job) as engine:
        published = {}
        for version in (1, 2):
            with trainer.write(version):
                fill(source)
            published[version] = values(source)
        for version in (1, 2, 1):
            engine.refit(exactly=version, timeout_s=30)
            assert same(published[version], target)
        with trainer.write(3):
            fill(source)
        states = {v.version: v.state for v in transfuse.Control(job=job).versions("model")}
        assert states[1] is VersionState.RETIRED
        assert (states[2], states[3]) == (VersionState.READY, VersionState.READY)


def test_retention_is_changed_between_versions(job):
    source, target = module(), module(seed=1)
    with publisher(source, job, retention=Retention.IN_PLACE) as trainer:
        with receiver(target, job) as engine:
            order = ("in_place", "snapshot", "in_place", Retention.SNAPSHOT)
            for version, retention in enumerate(order, start=1):
                trainer.set_retention(retention)
                with trainer.write(version):
                    fill(source)
                engine.refit(exactly=version, timeout_s=30)
                assert same(values(source), target)
        trainer.begin_write(9)
        with pytest.raises(transfuse.InvalidArgumentError, match="9"):
            trainer.set_retention("in_place")


def test_an_aborted_write_leaves_the_snapshot_before(job):
    source, target = module(), module(seed=1)
    with publisher(source, job) as trainer, receiver(target, job) as engine:
        with trainer.write(1):
            fill(source)
        published = values(source)
        with contextlib.suppress(ZeroDivisionError), trainer.write(2):
            fill(source)
            raise ZeroDivisionError
        assert trainer.version == 1
        engine.refit(timeout_s=30)
        assert same(published, target)


def test_optimizer_steps_do_not_wait_for_a_reader(job):
    source, target = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.01)
    stop = threading.Event()
    seen = []

    def read(engine):
        while not stop.is_set():
            seen.append(engine.refit(timeout_s=30).version)

    with publisher(source, job, drain_s=0.0, when_leased=WhenLeased.SKIP) as trainer:
        with receiver(target, job) as engine:
            with torch_optimizer.attach(optimizer, trainer) as attached:
                attached.publish_now()
                reading = threading.Thread(target=read, args=(engine,))
                reading.start()
                for _ in range(30):
                    optimizer.zero_grad()
                    source(torch.randn(3, 64)).square().sum().backward()
                    optimizer.step()
                stop.set()
                reading.join()
            assert attached.version == 31
            assert seen == sorted(seen), "versions never go back"
            last = attached.publish_now()  # nobody reads: it is not skipped
            engine.refit(exactly=last, timeout_s=30)
    assert same(values(source), target)


SLOW = {"snapshot_async": True, "snapshot_gigabytes_per_second": 0.0002}  # 37 KB: 0.2 s


def test_training_goes_on_while_a_version_is_copied_and_the_next_write_waits(job):
    source, target = module(), module(seed=1)
    with publisher(source, job, **SLOW) as trainer, receiver(target, job) as engine:
        assert trainer.snapshot.state is SnapshotState.NONE
        for version in (1, 2):
            trainer.begin_write(version)
            fill(source)
            assert trainer.publish(version).copying
            assert trainer.snapshot.state is SnapshotState.COPYING
            assert trainer.version == version - 1
            source(torch.randn(2, 64)).sum().backward()  # reads the weights
            assert trainer.begin_write(version + 1).copy_waited_us > 0
            assert trainer.snapshot.state is SnapshotState.PUBLISHED
            published = values(source)
            fill(source)
            engine.refit(exactly=version, timeout_s=30)
            assert same(published, target)
            trainer.abort_write("the next one begins anew")


def test_waiting_for_a_version_that_is_copied(job):
    source, target = module(), module(seed=1)
    with publisher(source, job, **SLOW) as trainer, receiver(target, job) as engine:
        assert trainer.wait_published().state is SnapshotState.NONE
        with trainer.write(1):
            fill(source)
        with pytest.raises(transfuse.DeadlineExceededError, match="version 1 .* being copied"):
            trainer.wait_published(timeout_s=0.01)
        done = trainer.wait_published(timeout_s=30)
        assert (done.state, done.version) == (SnapshotState.PUBLISHED, 1)
        assert done.copied_bytes == done.size_bytes
        engine.refit(timeout_s=30)
        assert same(values(source), target)


def test_a_version_that_is_given_up_while_it_is_copied_is_never_seen(job):
    source, target = module(), module(seed=1)
    with publisher(source, job, **SLOW) as trainer, receiver(target, job) as engine:
        with trainer.write(1):
            fill(source)
        trainer.abort_write("a better one comes at once")
        with trainer.write(2):
            fill(source)
        engine.refit(timeout_s=30)
        assert engine.version == 2
        states = {v.version: v.state for v in transfuse.Control(job=job).versions("model")}
        assert states[1] is VersionState.ABORTED


def test_optimizer_steps_wait_for_the_copy_and_every_version_is_whole(job):
    source, target = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.01)
    with publisher(source, job, **SLOW) as trainer, receiver(target, job) as engine:
        with torch_optimizer.attach(optimizer, trainer) as attached:
            for version in (1, 2, 3):
                optimizer.zero_grad()
                source(torch.randn(3, 64)).square().sum().backward()
                optimizer.step()
                assert attached.version == version
                engine.refit(exactly=version, timeout_s=30)
                assert same(values(source), target)


def test_an_optimizer_says_before_the_next_step_what_it_could_not_publish_and_goes_on(job):
    source, target = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.01)
    with publisher(source, job, compute_revision=True, snapshot_async=True) as trainer:
        with torch_optimizer.attach(optimizer, trainer) as attached:
            attached.publish_now()
            trainer.wait_published()
            trainer.begin_write(2)
            trainer.publish(2, revision="0" * 31 + "1")  # fails behind the trainer
        with torch_optimizer.attach(optimizer, trainer) as attached:
            with pytest.raises(transfuse.FingerprintMismatchError, match="version 2 of publisher"):
                optimizer.step()
            assert trainer.snapshot.state is SnapshotState.NONE
            source(torch.randn(3, 8)).sum().backward()
            optimizer.step()
            assert attached.version == 3
            states = {v.version: v.state for v in transfuse.Control(job=job).versions("model")}
            assert states[2] is VersionState.ABORTED
            with receiver(target, job) as engine:
                engine.refit(exactly=3, timeout_s=30)
                assert same(values(source), target)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"retention": "shadow"}, "in_place, snapshot"),
        ({"when_leased": "never"}, "skip"),
        ({"snapshot_slots": 0}, "snapshot_slots"),
        ({"snapshot_slots": 64}, "63"),
        ({"retention": "in_place", "snapshot_slots": 0, "snapshot_async": True}, "snapshot_async"),
    ],
)
def test_options_that_cannot_be_are_refused(job, options, words):
    with pytest.raises(transfuse.InvalidArgumentError, match=words):
        publisher(module(), job, **options)


def test_the_memory_of_snapshots_is_known_and_checked(job):
    layout, _ = hf.layout(module())
    one = transfuse.snapshot_bytes(layout, 1)
    assert one >= layout.parameter_bytes
    assert transfuse.snapshot_bytes(layout, 3) == 3 * one
