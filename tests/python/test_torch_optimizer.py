"""A publisher attached to an optimizer publishes after every step by itself."""

from __future__ import annotations

import types

import pytest
import torch
import transfuse
from transfuse import hf, torch_optimizer


@pytest.fixture
def world(job):
    model, engine = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    publisher = transfuse.Publisher(*hf.layout(model), name="trainer0", job=job)
    receiver = transfuse.Receiver(*hf.layout(engine), name="engine0", job=job)
    with publisher, receiver:
        yield model, optimizer, publisher, engine, receiver


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()


def test_every_step_is_a_version(world):
    model, optimizer, publisher, engine, receiver = world
    with torch_optimizer.attach(optimizer, publisher) as attached:
        assert attached.publish_now() == 1
        for version in (2, 3):
            step(model, optimizer)
            assert attached.version == publisher.version == version
            receiver.refit(exactly=version, timeout_s=30)
            assert torch.equal(model.weight, engine.weight)


def test_with_every_2_each_second_step_is_a_version(world):
    model, optimizer, publisher, _, _ = world
    with torch_optimizer.attach(optimizer, publisher, every=2):
        step(model, optimizer)
        assert publisher.version == 0
        step(model, optimizer)
        assert publisher.version == 1
        step(model, optimizer)
    assert publisher.version == 2, "detach publishes what was written"


def test_the_trainer_says_of_every_version_which_step_it_is(world):
    model, optimizer, publisher, _, receiver = world
    steps = iter((10, 20))
    with torch_optimizer.attach(optimizer, publisher, metadata=lambda: {"step": next(steps)}):
        for expected in ("10", "20"):
            step(model, optimizer)
            report = receiver.refit(require={"step": int(expected)}, timeout_s=30)
            assert report.metadata == {"step": expected}


def test_after_detach_steps_publish_nothing(world):
    model, optimizer, publisher, _, _ = world
    attached = torch_optimizer.attach(optimizer, publisher)
    step(model, optimizer)
    attached.detach()
    step(model, optimizer)
    assert publisher.version == attached.version == 1


def step_and_fail(model, optimizer, publisher):
    with torch_optimizer.attach(optimizer, publisher, every=2):
        step(model, optimizer)
        raise ZeroDivisionError


def test_an_exception_in_the_block_aborts_what_was_begun(world):
    model, optimizer, publisher, _, _ = world
    with pytest.raises(ZeroDivisionError):
        step_and_fail(model, optimizer, publisher)
    assert publisher.version == 0
    publisher.begin_write(2)
    publisher.publish(2)
    assert publisher.version == 2


def test_a_parameter_that_moved_is_found_before_stale_bytes_are_published(world):
    model, optimizer, publisher, _, _ = world
    with torch_optimizer.attach(optimizer, publisher) as attached:
        attached.publish_now()
        model.weight.data = model.weight.data.clone()
        with pytest.raises(transfuse.InvalidArgumentError, match="moved"):
            step(model, optimizer)
    assert publisher.version == 0


def test_every_below_1_is_refused(world):
    _, optimizer, publisher, _, _ = world
    with pytest.raises(transfuse.InvalidArgumentError, match="every"):
        torch_optimizer.attach(optimizer, publisher, every=0)


def test_weights_that_are_gathered_after_the_step_are_refused(world):
    _, _, publisher, _, _ = world
    lazy = types.SimpleNamespace(ddp_config=types.SimpleNamespace(overlap_param_gather=True))
    chained = types.SimpleNamespace(chained_optimizers=[lazy], param_groups=[], step=lambda: None)
    with pytest.raises(transfuse.UnsupportedError, match="overlap_param_gather"):
        torch_optimizer.attach(chained, publisher)
