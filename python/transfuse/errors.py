"""One exception class per error code; messages name the thing, the expected and the found."""

from __future__ import annotations

from typing import ClassVar

from transfuse._transfuse import ErrorCode


class TransfuseError(Exception):
    """Base of every error that Transfuse raises."""

    code: ClassVar[ErrorCode]


class InvalidArgumentError(TransfuseError, ValueError):
    """The caller's input is wrong; retrying changes nothing."""

    code = ErrorCode.INVALID_ARGUMENT


class LayoutMismatchError(TransfuseError):
    """Gaps, overlaps, dtype or shape conflicts between layouts; see diagnose()."""

    code = ErrorCode.LAYOUT_MISMATCH


class CorruptError(TransfuseError):
    """Bytes from another process or a file do not parse, or exceed what was registered."""

    code = ErrorCode.CORRUPT


class NotFoundError(TransfuseError, LookupError):
    """No such name, digest, version or region."""

    code = ErrorCode.NOT_FOUND


class AlreadyExistsError(TransfuseError):
    """A live owner has this name, or this version was published before."""

    code = ErrorCode.ALREADY_EXISTS


class PermissionDeniedError(TransfuseError):
    """The kernel or the peer refused; the message names the remedy."""

    code = ErrorCode.PERMISSION_DENIED


class ResourceExhaustedError(TransfuseError):
    """Memory, shared memory, descriptors or a bound of Transfuse is used up."""

    code = ErrorCode.RESOURCE_EXHAUSTED


class UnavailableError(TransfuseError):
    """The peer or the coordinator is gone; another source or a retry may succeed."""

    code = ErrorCode.UNAVAILABLE


class DeadlineExceededError(TransfuseError):
    """The deadline passed, or no progress was seen for too long."""

    code = ErrorCode.DEADLINE_EXCEEDED


class TornReadError(TransfuseError):
    """The source was written while it was read; nothing was committed."""

    code = ErrorCode.TORN_READ


class VersionGoneError(TransfuseError):
    """The version was retired, aborted or revoked."""

    code = ErrorCode.VERSION_GONE


class FingerprintMismatchError(TransfuseError):
    """Bytes that arrived differ from what the source holds."""

    code = ErrorCode.FINGERPRINT_MISMATCH


class PoisonedError(TransfuseError):
    """An abandoned operation may still write this memory."""

    code = ErrorCode.POISONED


class CancelledError(TransfuseError):
    """Ended by the caller."""

    code = ErrorCode.CANCELLED


class GroupBrokenError(TransfuseError):
    """Ranks of one engine do not hold the same version: none may serve until that is repaired."""

    code = ErrorCode.GROUP_BROKEN


class UnsupportedError(TransfuseError):
    """Not available in this build or on this host; the message names what is missing."""

    code = ErrorCode.UNSUPPORTED


class NoFittingSourceError(TransfuseError):
    """Sources are there, but not what the target demands; the message says which, and why."""

    code = ErrorCode.NO_FITTING_SOURCE


CLASS_OF_CODE: dict[ErrorCode, type[TransfuseError]] = {
    cls.code: cls
    for cls in (
        InvalidArgumentError,
        LayoutMismatchError,
        CorruptError,
        NotFoundError,
        AlreadyExistsError,
        PermissionDeniedError,
        ResourceExhaustedError,
        UnavailableError,
        DeadlineExceededError,
        TornReadError,
        VersionGoneError,
        FingerprintMismatchError,
        PoisonedError,
        CancelledError,
        GroupBrokenError,
        UnsupportedError,
        NoFittingSourceError,
    )
}
