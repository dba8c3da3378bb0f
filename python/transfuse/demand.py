"""What a receiver demands of sources: kinds, metadata and a revision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from transfuse._transfuse import Demand, Digest, Requirement, RequirementKind
from transfuse.errors import InvalidArgumentError


@dataclass(frozen=True)
class AtLeast:
    """A whole number that is not below `value`: the least training step, say."""

    value: int


class Present:
    """Any value, as long as the key is there; see PRESENT."""

    def __repr__(self) -> str:
        return "PRESENT"


PRESENT: Final = Present()

Condition: TypeAlias = str | int | AtLeast | Present


def _requirement(key: str, condition: Condition, tensors: str) -> Requirement:
    if isinstance(condition, AtLeast):
        return Requirement(key, RequirementKind.AT_LEAST, str(condition.value), tensors)
    if isinstance(condition, Present):
        return Requirement(key, RequirementKind.PRESENT, "", tensors)
    if isinstance(condition, bool) or not isinstance(condition, str | int):
        message = f"{key!r}: expected a str, an int, AtLeast or PRESENT, found {condition!r}"
        raise InvalidArgumentError(message)
    return Requirement(key, RequirementKind.EQUALS, str(condition), tensors)


def demand_of(
    kinds: Iterable[str] = (),
    require: Mapping[str, Condition] | None = None,
    require_tensors: Mapping[str, Mapping[str, Condition]] | None = None,
    revision: Digest | str | None = None,
) -> Demand:
    """As the arguments of Receiver say it."""
    if isinstance(kinds, str):
        kinds = (kinds,)
    requirements = [_requirement(key, each, "") for key, each in (require or {}).items()]
    for pattern, conditions in (require_tensors or {}).items():
        if not pattern:
            message = "require_tensors: expected a pattern of tensor names, found ''"
            raise InvalidArgumentError(message)
        requirements += [_requirement(key, each, pattern) for key, each in conditions.items()]
    return Demand(list(kinds), requirements, revision_of(revision))


def revision_of(revision: Digest | str | None) -> Digest | None:
    """A revision as it is, or from its text."""
    return Digest.parse(revision) if isinstance(revision, str) else revision


def metadata_of(metadata: Mapping[str, str | int] | None) -> dict[str, str]:
    """Metadata with its numbers as text."""
    checked = {}
    for key, value in (metadata or {}).items():
        if isinstance(value, bool) or not isinstance(value, str | int):
            message = f"metadata {key!r}: expected a str or an int, found {value!r}"
            raise InvalidArgumentError(message)
        checked[key] = str(value)
    return checked
