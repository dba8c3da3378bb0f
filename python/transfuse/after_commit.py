"""What an engine computes from its weights, again after every commit; part of Receiver."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from transfuse._transfuse import ErrorCode
from transfuse.errors import InvalidArgumentError, TransfuseError

Derive = Callable[[str, object], object]


class AfterCommitError(TransfuseError):
    """A hook failed: the weights are of `version`, and what is derived from them is not.

    Receiver.version is 0 until Receiver.run_hooks() or a refit succeeds: do not serve. `hook` and
    `parameter` ("" for a hook of the whole engine) say where; the cause is the hook's own error.
    """

    code: ClassVar[ErrorCode] = ErrorCode.INVALID_ARGUMENT

    def __init__(self, hook: str, parameter: str, version: int, cause: BaseException) -> None:
        where = f" for {parameter}" if parameter else ""
        found = f"{type(cause).__name__}: {cause}"
        super().__init__(
            f"after the commit of version {version}: hook {hook!r}{where}: expected to return, "
            f"found {found}; the parameters hold version {version}, what is derived from them "
            "does not: do not serve"
        )
        self.hook = hook
        self.parameter = parameter
        self.version = version


@dataclass(frozen=True)
class HookRun:
    """One hook after one commit. `error` is empty if it returned."""

    hook: str
    parameter: str
    microseconds: int
    error: str = ""


class AfterCommit:
    """The hooks of a receiver in their order. `runs` are those after the last commit."""

    def __init__(
        self,
        parameters: Mapping[str, object],
        after_commit: Mapping[str, Callable[[], object]] | Callable[[], object] | None,
        derived: Mapping[str, Derive] | None,
    ) -> None:
        self.runs: list[HookRun] = []
        self.failed: AfterCommitError | None = None
        self._version = 0  # that they have succeeded for
        self._hooks: list[tuple[str, str, Callable[[], object]]] = []
        if callable(after_commit):
            after_commit = {getattr(after_commit, "__name__", "after_commit"): after_commit}
        for name, hook in (after_commit or {}).items():
            self._hooks.append((name, "", _callable(name, hook)))
        for pattern, derive in (derived or {}).items():
            names = sorted(fnmatch.filter(parameters, pattern))
            if not names:
                known = ", ".join(sorted(parameters)[:4])
                message = f"derived: {pattern!r} is the name of no parameter"
                raise InvalidArgumentError(f"{message}; found {known}...")
            _callable(pattern, derive)
            self._hooks += [(pattern, n, _bound(derive, n, parameters[n])) for n in names]

    def hold(self, version: int) -> bool:
        """Whether what is derived is of this version."""
        return not self._hooks or self._version == version

    def run(self, version: int) -> None:
        """All hooks; the first that fails ends it with AfterCommitError."""
        self.runs, self.failed, self._version = [], None, 0
        for hook, parameter, call in self._hooks:
            start = time.perf_counter()
            try:
                call()
            except BaseException as error:
                self._note(hook, parameter, start, f"{type(error).__name__}: {error}")
                self.failed = AfterCommitError(hook, parameter, version, error)
                if not isinstance(error, Exception):
                    raise  # Ctrl-C stays what it is; the weights are without their derived state
                raise self.failed from error
            self._note(hook, parameter, start)
        self._version = version

    def _note(self, hook: str, parameter: str, start: float, error: str = "") -> None:
        microseconds = round((time.perf_counter() - start) * 1e6)
        self.runs.append(HookRun(hook, parameter, microseconds, error))


def hooks_to_text(runs: Iterable[HookRun]) -> str:
    """One line for each hook that ran."""
    lines = []
    for run in runs:
        name = f"{run.hook} ({run.parameter})" if run.parameter else run.hook
        lines.append(f"after commit: {name}: {run.microseconds / 1e3:.2f} ms {run.error}".rstrip())
    return "\n".join(lines)


def _callable(name: str, hook: object) -> Callable[..., object]:
    if not callable(hook):
        found = type(hook).__name__
        raise InvalidArgumentError(f"hook {name!r}: expected a callable, found {found}")
    return hook


def _bound(derive: Derive, name: str, parameter: object) -> Callable[[], object]:
    return lambda: derive(name, parameter)
