"""Publisher, Receiver and Control: the two ends of a refit, and the view of a job from outside."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeVar

from transfuse._device import finish_queued_work, ordinal_of
from transfuse._transfuse import (
    Digest,
    GroupInfo,
    Layout,
    MemberInfo,
    NativeControl,
    NativePublisher,
    NativeReceiver,
    PublishTiming,
    ReceiveInto,
    RefitReport,
    Retention,
    SnapshotPlace,
    SnapshotProgress,
    StageProgress,
    Verify,
    VerifyReport,
    VersionEvent,
    VersionInfo,
    VersionRevision,
    WhenLeased,
    WriteTiming,
)
from transfuse.after_commit import AfterCommit, Derive, HookRun
from transfuse.checkpoint import Checkpoint, native_checkpoint
from transfuse.demand import Condition, demand_of, metadata_of, revision_of
from transfuse.errors import GroupBrokenError, InvalidArgumentError
from transfuse.guard import PointerGuard, PointerMovedError

if TYPE_CHECKING:
    import torch

DEFAULT_JOB = ""  # $TRANSFUSE_JOB or "default"
_FOREVER_MS = 1 << 40


_DEFAULT_SLOTS = 2  # one is read while the next is written
_T = TypeVar("_T")
_RETENTIONS = {"in_place": Retention.IN_PLACE, "snapshot": Retention.SNAPSHOT}
_SNAPSHOT_PLACES = {"with_weights": SnapshotPlace.WITH_WEIGHTS, "host": SnapshotPlace.HOST}
_INTO = {"in_place": ReceiveInto.IN_PLACE, "shadow": ReceiveInto.SHADOW}
_WHEN_LEASED = {
    "revoke_at_deadline": WhenLeased.REVOKE_AT_DEADLINE,
    "wait": WhenLeased.WAIT,
    "revoke": WhenLeased.REVOKE,
    "skip": WhenLeased.SKIP,
}


def _choice(what: str, value: _T | str, names: Mapping[str, _T]) -> _T:
    """An enum member as it is, or by its name in lower case."""
    if not isinstance(value, str):
        return value
    if value not in names:
        message = f"{what}: expected one of {', '.join(names)}, found {value!r}"
        raise InvalidArgumentError(message)
    return names[value]


def _milliseconds(seconds: float) -> int:
    return max(0, min(_FOREVER_MS, round(seconds * 1000)))


class Publisher:
    """Offers the weights of this process, version after version.

    `parameters` names every parameter of `layout` once: a tensor (data_ptr), an array (DLPack) or a
    buffer; contiguous memory that stays where it is while the publisher lives, of the host or of
    one GPU. `device` (None: the GPU of the parameters) is where the transport works; with it
    parameters in memory of the host can be read into GPUs. publish() waits for what was queued on
    torch's current stream of the device; work on other streams is the caller's to wait for.

    `retention` "in_place": readers read where the trainer keeps the weights. Between begin_write()
    and publish() nobody reads; outside of it the caller must not write. "snapshot": publish()
    copies the weights into one of `snapshot_slots` slots (snapshot_bytes() says what they take;
    None: 2, or none in place, and then there is no changing to "snapshot" with set_retention()),
    and the caller may write at any other time; a leased copy is never overwritten. If readers hold
    every slot, `when_leased` says what publish() does: "revoke_at_deadline" (wait drain_s, then
    revoke the readers of the oldest), "wait" (DeadlineExceededError after drain_s, readers are left
    alone), "revoke" (at once) or "skip" (readers never see this version). `snapshot_place` of
    weights on a GPU: "with_weights", or "host", which takes no memory of the GPU and copies over
    PCIe. Copies into memory of the host, from wherever, keep to `snapshot_gigabytes_per_second`
    (0: as fast as possible).

    `snapshot_async`: publish() returns when the copy has begun, and readers see the version when it
    is whole. Until the next begin_write() the weights may be read (a forward and a backward pass),
    and must not be written, moved or put to sleep: begin_write(), publish(), set_retention() and
    close() wait for the copy, drain_s at most, and raise why it failed; then publish() that version
    again, or abort_write() it. `snapshot` says how far it is, from any thread.

    `kind` says for which consumer the values were made ("hf_raw", "vllm_fused", "deepgemm_fp8",
    "cutlass_fp8", "trtllm", or a word of yours; None: what the layout says), `metadata` whatever
    receivers may ask for, for as long as this publisher lives. `compute_revision`: publish() states
    the content address of the weights (transfuse.revision(); one more pass over them), for sources
    that hold the whole model.

    Use it from one thread at a time. Transport and coordinator of the job are opened inside and
    shared by everything of the job in this process; `address` names a coordinator started by hand,
    `token` is what it may ask for.
    """

    def __init__(
        self,
        layout: Layout,
        parameters: Mapping[str, object],
        *,
        name: str,
        model: str = "model",
        source_count: int = 1,
        drain_s: float = 30.0,
        retention: Retention | str = Retention.IN_PLACE,
        snapshot_slots: int | None = None,
        snapshot_place: SnapshotPlace | str = SnapshotPlace.WITH_WEIGHTS,
        snapshot_gigabytes_per_second: float = 0.0,
        snapshot_async: bool = False,
        when_leased: WhenLeased | str = WhenLeased.REVOKE_AT_DEADLINE,
        fingerprint_threads: int = 0,
        kind: str | None = None,
        metadata: Mapping[str, str | int] | None = None,
        compute_revision: bool = False,
        job: str = DEFAULT_JOB,
        address: str | None = None,
        token: str | None = None,
        threads: int | None = None,
        allow_any_tracer: bool | None = None,
        device: int | str | torch.device | None = None,
    ) -> None:
        kept = _choice("retention", retention, _RETENTIONS)
        if snapshot_slots is None:
            snapshot_slots = _DEFAULT_SLOTS if kept == Retention.SNAPSHOT else 0
        self._native = NativePublisher(
            layout if kind is None else layout.with_kind(kind),
            dict(parameters),
            name=name,
            model=model,
            source_count=source_count,
            drain_ms=_milliseconds(drain_s),
            retention=kept,
            snapshot_slots=snapshot_slots,
            snapshot_place=_choice("snapshot_place", snapshot_place, _SNAPSHOT_PLACES),
            snapshot_gigabytes_per_second=snapshot_gigabytes_per_second,
            snapshot_async=snapshot_async,
            when_leased=_choice("when_leased", when_leased, _WHEN_LEASED),
            fingerprint_threads=fingerprint_threads,
            metadata=metadata_of(metadata),
            compute_revision=compute_revision,
            job=job,
            address=address,
            token=token,
            threads=threads,
            allow_any_tracer=allow_any_tracer,
            device=ordinal_of(device),
        )
        self._device = self._native.device
        self._close = weakref.finalize(self, self._native.close)

    @property
    def device(self) -> int | None:
        """The GPU that its transport works on; None: memory of the host."""
        return self._device

    @property
    def version(self) -> int:
        """The version that was published last; 0 if none, or while one is written."""
        return self._native.version

    def begin_write(self, version: int) -> WriteTiming:
        """Waits until nobody reads the weights themselves (drain_s, then readers are revoked).

        Versions rise. With snapshots nobody is waited for, but with `snapshot_async` the copy of
        the version before.
        """
        return self._native.begin_write(version)

    def publish(
        self,
        version: int,
        *,
        metadata: Mapping[str, str | int] | None = None,
        revision: Digest | str | None = None,
    ) -> PublishTiming:
        """Offers what was written. READY when all `source_count` sources have published it.

        `metadata` and `revision` are said of this version alone, and cost readers no new plan. With
        `compute_revision` a revision that the weights do not have is a FingerprintMismatchError.
        After DeadlineExceededError or UnavailableError it may be called again.
        """
        words = metadata_of(metadata)
        finish_queued_work(self._device)
        return self._native.publish(version, words, revision_of(revision))

    def set_retention(self, retention: Retention | str) -> None:
        """From the next begin_write() on; not while a version is being written."""
        self._native.set_retention(_choice("retention", retention, _RETENTIONS))

    @property
    def snapshot(self) -> SnapshotProgress:
        """What became of the last version with `snapshot_async`; may be asked from any thread."""
        return self._native.snapshot

    def wait_published(self, timeout_s: float = 60.0) -> SnapshotProgress:
        """With `snapshot_async`: returns when the last version is there; raises why it failed.

        DeadlineExceededError: it is still being copied, and goes on; so it does after Ctrl-C.
        """
        return self._native.wait_published(_milliseconds(timeout_s))

    def abort_write(self, reason: str) -> None:
        """Gives up the version that is being written, or copied.

        The one before is gone too, unless it is a snapshot.
        """
        self._native.abort_write(reason)

    @contextlib.contextmanager
    def write(
        self,
        version: int,
        *,
        metadata: Mapping[str, str | int] | None = None,
        revision: Digest | str | None = None,
    ) -> Iterator[WriteTiming]:
        """begin_write(), the body, publish(); an exception in the body aborts the version."""
        timing = self.begin_write(version)
        try:
            yield timing
        except BaseException as error:
            self.abort_write(f"{type(error).__name__}: {error}")
            raise
        self.publish(version, metadata=metadata, revision=revision)

    def close(self) -> None:
        """Leaves the job and ends the registration of the memory. A second call does nothing."""
        self._close()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Stage:
    """A version on its way into the shadow of a receiver; see Receiver.stage().

    `progress` may be asked from any thread and speaks of the receiver's latest stage.
    """

    def __init__(self, native: NativeReceiver) -> None:
        self._native = native

    @property
    def progress(self) -> StageProgress:
        """State, version (0: not known yet), bytes that have landed, bytes in all."""
        return self._native.staged

    def wait(self, timeout_s: float = 60.0) -> StageProgress:
        """Returns when the version is ready to be committed; raises why it failed.

        DeadlineExceededError: it still moves, and goes on moving; so it does after Ctrl-C.
        """
        return self._native.wait_staged(_milliseconds(timeout_s))

    def cancel(self) -> None:
        """Ends it with CancelledError. The parameters keep what they hold."""
        self._native.cancel()


class Receiver:
    """Brings versions into the parameters of this process, proved.

    `parameters` and `device` as for Publisher, writable; with a device parameters in memory of the
    host can take what GPUs hold. refit(), commit() and rollback() wait for torch's current stream
    before they write, and return when the bytes are there. Memory for the same layout at another
    place takes a new receiver. `spread` is this target's number among its peers.

    `into="in_place"`: refit() overwrites the parameters; after one that failed in or after the
    transfer they hold no version until one succeeds. `into="shadow"`: versions arrive in a second
    copy in memory of Transfuse (`shadow_bytes(layout)`); refit() or commit() copies them into the
    parameters, and a failure before leaves the version that was there. `keep_previous` exchanges
    instead of copying, for rollback().

    `group` and `group_size`: the ranks of one engine, which commit all or none. GroupBrokenError
    means that no rank may serve until a refit() of all of them, or check_group(), succeeds;
    `version` is what the parameters of this rank hold, whatever the others do. A round without a
    decision is given up after `round_s`.

    `after_commit` (hooks by name, or one) and then `derived` run whenever the parameters have
    changed: in refit(), commit() and rollback(), before these return. `derived` has patterns of
    parameter names; its functions get (name, memory of the parameter). After AfterCommitError the
    weights are there and what is derived from them is not: `version` is 0 and check_group() fails
    on this rank until run_hooks() or the next refit() succeeds. `hook_runs` says what ran.

    `guard`: a module, tensors by name, or a callable that returns them. PointerMovedError, before
    anything is written or after it, names the one that does not lie where it lay when the receiver
    was made; then too `version` is 0.

    `kinds`, `require`, `require_tensors` and `revision` are demanded of sources; those that do not
    fit are not read, and `report.steps` says why. `require` maps keys of metadata to a value,
    AtLeast(n) or PRESENT; `require_tensors` maps patterns of tensor names ("*.experts.*") to such
    requirements. A refit waits for a version that fits; NoFittingSourceError names who is there and
    why it does not fit. The ranks of a group demand the same.

    `checkpoint` is the last source: it is read when no peer can serve what is asked for, and the
    report says so (`report.checkpoint`, `report.steps`). A version of peers is waited for
    `checkpoint_wait_s` at most, and peers have half of a refit's time. Nothing goes back to older
    weights unless exactly those were asked for; in a group only ranks that hold no version fall
    back.

    Use it from one thread at a time; cancel() and Stage.progress from any.
    """

    def __init__(
        self,
        layout: Layout,
        parameters: Mapping[str, object],
        *,
        name: str,
        model: str = "model",
        verify: Verify = Verify.FULL,
        chunk_bytes: int = 1 << 20,
        spread: int = 0,
        no_progress_s: float = 2.0,
        max_attempts: int = 8,
        into: ReceiveInto | Literal["in_place", "shadow"] = "in_place",
        keep_previous: bool = False,
        group: str = "",
        group_size: int = 0,
        round_s: float = 60.0,
        after_commit: Mapping[str, Callable[[], object]] | Callable[[], object] | None = None,
        derived: Mapping[str, Derive] | None = None,
        guard: torch.nn.Module
        | Mapping[str, torch.Tensor]
        | Callable[[], Mapping[str, torch.Tensor]]
        | None = None,
        kinds: Iterable[str] = (),
        require: Mapping[str, Condition] | None = None,
        require_tensors: Mapping[str, Mapping[str, Condition]] | None = None,
        revision: Digest | str | None = None,
        checkpoint: Checkpoint | None = None,
        checkpoint_wait_s: float = 2.0,
        job: str = DEFAULT_JOB,
        address: str | None = None,
        token: str | None = None,
        threads: int | None = None,
        allow_any_tracer: bool | None = None,
        device: int | str | torch.device | None = None,
    ) -> None:
        self._name = name
        self._hooks = AfterCommit(parameters, after_commit, derived)
        self._guard = None if guard is None else PointerGuard(guard)
        self._moved = ""  # what the guard said last
        self._native = NativeReceiver(
            layout,
            dict(parameters),
            name=name,
            model=model,
            verify=verify,
            chunk_bytes=chunk_bytes,
            spread=spread,
            no_progress_ms=_milliseconds(no_progress_s),
            max_attempts=max_attempts,
            into=_choice("into", into, _INTO),
            keep_previous=keep_previous,
            group=group,
            group_size=group_size,
            round_ms=_milliseconds(round_s),
            demand=demand_of(kinds, require, require_tensors, revision),
            checkpoint=None if checkpoint is None else native_checkpoint(checkpoint),
            checkpoint_wait_ms=_milliseconds(checkpoint_wait_s),
            job=job,
            address=address,
            token=token,
            threads=threads,
            allow_any_tracer=allow_any_tracer,
            device=ordinal_of(device),
        )
        self._device = self._native.device
        self._close = weakref.finalize(self, self._native.close)

    @property
    def device(self) -> int | None:
        """The GPU that its transport works on; None: memory of the host."""
        return self._device

    @property
    def version(self) -> int:
        """What the parameters, and what is derived from them, hold; 0: no version."""
        version = self._native.version
        return version if self._hooks.hold(version) and not self._moved else 0

    @property
    def hook_runs(self) -> list[HookRun]:
        """The hooks that ran after the last commit, the one that failed last."""
        return list(self._hooks.runs)

    @property
    def last_report(self) -> RefitReport:
        """What the last refit did, also after it failed."""
        return self._native.last_report

    def refit(
        self,
        *,
        exactly: int | None = None,
        at_least: int | None = None,
        require: Mapping[str, Condition] | None = None,
        revision: Digest | str | None = None,
        timeout_s: float = 60.0,
    ) -> RefitReport:
        """Waits for a version that fits (without a wish: the newest) and brings it in.

        Returns when every byte of the one version in the report is in place and proved; raises a
        typed error otherwise. Call it at the engine's own safe point. `require` and `revision` are
        demanded besides what the receiver demands.
        """
        timeout_ms = _milliseconds(timeout_s)
        self._before_write("before the refit")
        report = self._native.refit(
            exactly=exactly,
            at_least=at_least,
            demand=demand_of(require=require, revision=revision),
            timeout_ms=timeout_ms,
        )
        self.run_hooks()
        return report

    def run_hooks(self) -> None:
        """The hooks once more, for the version that the parameters hold: after one has failed."""
        self._hooks.run(self._native.version)
        self._check_places("after the commit")

    def stage(
        self,
        *,
        exactly: int | None = None,
        at_least: int | None = None,
        require: Mapping[str, Condition] | None = None,
        revision: Digest | str | None = None,
        timeout_s: float = 60.0,
        max_gigabytes_per_second: float = 0.0,
        max_multiprocessors: int = 0,
    ) -> Stage:
        """Begins to bring a version into the shadow while the engine serves; returns at once.

        One that is ready and was not committed is replaced; AlreadyExistsError while one moves.
        `max_gigabytes_per_second` (of bytes written) and, on a GPU, `max_multiprocessors` leave
        room for what runs beside it; 0: as fast as possible.
        """
        self._native.stage(
            exactly=exactly,
            at_least=at_least,
            demand=demand_of(require=require, revision=revision),
            timeout_ms=_milliseconds(timeout_s),
            max_gigabytes_per_second=max_gigabytes_per_second,
            max_multiprocessors=max_multiprocessors,
        )
        return Stage(self._native)

    def commit(self, *, timeout_s: float = 60.0) -> RefitReport:
        """Brings what is staged into the parameters. Call it at the engine's own safe point.

        In a group: CancelledError if it was decided to give the version up (the one before stays),
        GroupBrokenError if the decision or a rank was lost.
        """
        self._before_write("before the commit")
        report = self._native.commit(_milliseconds(timeout_s))
        self.run_hooks()
        return report

    def rollback(self, *, timeout_s: float = 10.0) -> int:
        """The version before the last commit comes back (keep_previous); returns its number.

        NotFoundError if it was not kept, or a stage began since.
        """
        self._before_write("before the rollback")
        version = self._native.rollback(_milliseconds(timeout_s))
        self.run_hooks()
        return version

    def check_group(self) -> GroupInfo:
        """Asks the coordinator; GroupBrokenError unless every rank holds the same version.

        And unless this rank's hooks have succeeded and its parameters lie where they lay.
        """
        if self._moved:
            raise GroupBrokenError(f"{self._name}: {self._moved}")
        group, version = self._native.check_group(), self._native.version
        if not self._hooks.hold(version):
            failed = self._hooks.failed or f"hooks have not run for version {version}"
            raise GroupBrokenError(f"{self._name}: {failed}; call run_hooks()")
        return group

    def _before_write(self, when: str) -> None:
        self._check_places(when)
        finish_queued_work(self._device)

    def _check_places(self, when: str) -> None:
        if self._guard is None:
            return
        try:
            self._guard.check(when)
        except PointerMovedError as error:
            self._moved = str(error)
            raise
        self._moved = ""

    def cancel(self) -> None:
        """A refit, stage or commit that runs in another thread ends with CancelledError."""
        self._native.cancel()

    def close(self) -> None:
        """Leaves the job and lets the memory go. A second call does nothing."""
        self._close()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Control:
    """The members and versions of a job, seen without being a member of it."""

    def __init__(
        self, *, job: str = DEFAULT_JOB, address: str | None = None, token: str | None = None
    ) -> None:
        self._native = NativeControl(job=job, address=address, token=token)

    def versions(self, model: str = "") -> list[VersionInfo]:
        """The versions of a model, or of all models."""
        return self._native.versions(model)

    def members(self, model: str = "") -> list[MemberInfo]:
        """The live members of a model, or of all models."""
        return self._native.members(model)

    def history(self, model: str, version: int) -> list[VersionEvent]:
        """What happened to a version, oldest first; NotFoundError if it is not known any more."""
        return self._native.history(model, version)

    def groups(self, model: str = "") -> list[GroupInfo]:
        """The groups of targets of a model, or of all models."""
        return self._native.groups(model)

    def watch(self, model: str, *, timeout_s: float = float("inf")) -> Iterator[VersionInfo]:
        """Version changes of a model as they happen; ends when none came for `timeout_s`."""
        watch = self._native.watch(model)
        timeout_ms = _FOREVER_MS if timeout_s == float("inf") else _milliseconds(timeout_s)
        while (change := watch.next(timeout_ms)) is not None:
            yield change

    def revision(self, model: str, version: int = 0, *, timeout_s: float = 60.0) -> VersionRevision:
        """The content address of a version (0: the newest), however its sources shard it.

        Its sources sum what they hold; no weights move. `stated` is what they say it is.
        """
        return self._native.revision(model, version, _milliseconds(timeout_s))

    def verify(self, model: str, *, timeout_s: float = 60.0) -> VerifyReport:
        """Compares what the targets of a model hold with what its sources publish."""
        return self._native.verify(model, _milliseconds(timeout_s))
