"""Publishes after every step of a torch optimizer, so that a forgotten call cannot happen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

import torch

from transfuse._transfuse import SnapshotState
from transfuse.errors import (
    InvalidArgumentError,
    TransfuseError,
    UnsupportedError,
    VersionGoneError,
)
from transfuse.session import Publisher


class SteppingOptimizer(Protocol):
    """What is asked of an optimizer that is not torch's own, such as Megatron-Core's."""

    step: Callable[..., Any]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As torch's."""


class _Hook(Protocol):
    def remove(self) -> None: ...


class _AroundStep:
    """The hooks of an optimizer without hooks: its step() itself, until remove()."""

    def __init__(
        self,
        optimizer: SteppingOptimizer,
        before: Callable[[object], None],
        after: Callable[[object], None],
    ) -> None:
        self._optimizer = optimizer
        step = optimizer.step

        def around(*args: object, **options: object) -> object:
            before(optimizer)
            result = step(*args, **options)
            after(optimizer)
            return result

        optimizer.step = around

    def remove(self) -> None:
        """The optimizer is as its class made it."""
        vars(self._optimizer).pop("step", None)


class Attachment:
    """The hooks of attach(); detach() or leaving the `with` block removes them."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | SteppingOptimizer,
        publisher: Publisher,
        every: int,
        metadata: Callable[[], Mapping[str, str | int]] | None,
    ) -> None:
        self._optimizer = optimizer
        self._publisher = publisher
        self._every = every
        self._metadata = metadata
        self._steps = 0
        self._version = max(publisher.version, publisher.snapshot.version)
        self._writing = False
        self._addresses = _addresses(optimizer)
        self._handles: list[_Hook]
        if isinstance(optimizer, torch.optim.Optimizer):
            self._handles = [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            ]
        else:
            self._handles = [_AroundStep(optimizer, self._before, self._after)]

    @property
    def version(self) -> int:
        """The last version that these hooks published or skipped, or the publisher had before.

        With `snapshot_async` it may still be on its way: Publisher.snapshot.
        """
        return self._version

    def publish_now(self) -> int:
        """Publishes the weights as they are: the first version, or one between two steps."""
        self._open()
        return self._publish()

    def detach(self) -> None:
        """Removes the hooks; a version that is being written (every > 1) is published."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._writing:
            self._publish()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._writing:
            self._writing = False
            self._publisher.abort_write(f"{kind.__name__}: {value}")
        self.detach()

    def _before(self, _optimizer: object, *_call: object) -> None:
        self._open()

    def _after(self, _optimizer: object, *_call: object) -> None:
        self._steps += 1
        if self._steps % self._every == 0:
            self._publish()

    def _open(self) -> None:
        if self._writing:
            return
        try:
            self._publisher.begin_write(self._version + 1)
        except VersionGoneError:
            raise  # nobody can publish that version any more
        except TransfuseError as error:
            failed = self._publisher.snapshot
            if failed.state is SnapshotState.FAILED and failed.version == self._version:
                self._give_up(error)
            raise
        self._writing = True

    def _give_up(self, reason: TransfuseError) -> None:
        """Of the version that could not be copied: the next step writes the one after it."""
        try:
            self._publisher.abort_write(str(reason))
        except TransfuseError as error:
            reason.add_note(f"abort_write() failed too: {error}")

    def _publish(self) -> int:
        if _addresses(self._optimizer) != self._addresses:
            self._writing = False
            message = (
                "a parameter of the optimizer has moved to other memory since attach(); "
                "what is published lies at the old place: open a new Publisher"
            )
            self._publisher.abort_write(message)
            raise InvalidArgumentError(message)
        words = None if self._metadata is None else self._metadata()
        self._publisher.publish(self._version + 1, metadata=words)
        self._writing = False
        self._version += 1
        return self._version


def attach(
    optimizer: torch.optim.Optimizer | SteppingOptimizer,
    publisher: Publisher,
    *,
    every: int = 1,
    metadata: Callable[[], Mapping[str, str | int]] | None = None,
) -> Attachment:
    """Wraps every optimizer step into begin_write() and publish().

    Before a step the hook waits for readers; after it, it publishes the next version. A publisher
    with snapshots lets the step begin at once, and copies the weights after it; with
    `snapshot_async` the step waits for that copy, and its failure is raised before the step. With
    `every` = k a version is published after every k-th step, and (in place) from the first of these
    steps on the version before cannot be read. The weights as they are now are not published: call
    publish_now() for that. `metadata` is asked, before each version is published, what to say of
    it.

    Optimizers of Megatron-Core are published after the whole of their step(), in which they copy
    what they keep in float32 into the weights of the model.
    """
    if every < 1:
        message = f"every: expected at least 1, found {every}"
        raise InvalidArgumentError(message)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(getattr(part, "ddp_config", None), "overlap_param_gather", False):
            message = (
                "overlap_param_gather: the weights after a step are gathered in the next forward "
                "pass; publish by hand, after start_param_sync(force_sync=True) of every chunk"
            )
            raise UnsupportedError(message)
    return Attachment(optimizer, publisher, every, metadata)


def _addresses(optimizer: torch.optim.Optimizer | SteppingOptimizer) -> list[int]:
    addresses = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held = parameter.detach()
            to_local = getattr(held, "to_local", None)
            addresses.append((held if to_local is None else to_local()).data_ptr())
    return addresses
