"""Snapshots from Python: the trainer goes on, readers see exactly what was published."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
import transfuse
from transfuse import Retention, VersionState, WhenLeased, hf, torch_optimizer


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"retention": "shadow"}, "in_place, snapshot"),
        ({"when_leased": "never"}, "skip"),
        ({"snapshot_slots": 0}, "snapshot_slots"),
        ({"snapshot_slots": 64}, "63"),
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
