"""Layouts learned from an engine's own loader: transfuse.capture(), which needs torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from transfuse._transfuse import Layout
from transfuse.session import Receiver

if TYPE_CHECKING:
    import torch

    from transfuse._capture.catalog import Catalog

LoadWeights = Callable[[Iterable[tuple[str, "torch.Tensor"]]], object]
Way = Literal["direct", "followed", "fallback", "unused"]
_MANY = 20  # lines of one kind that to_text() writes out


@dataclass(frozen=True)
class TensorWay:
    """How one catalog tensor reaches the parameters of this process.

    "direct": the loader copies views of it. "followed": through other memory, or a cast, but every
    element is moved as it is. "fallback": as a whole into staging, and from there by the engine's
    own loader after every commit; `reason` says why. "unused": this process needs none of it.
    """

    name: str
    way: Way
    reason: str = ""
    tile_count: int = 0
    asked: bool = True  # False: the loader stopped before it came to this tensor


@dataclass(frozen=True)
class CaptureReport:
    """What a capture has found, tensor by tensor."""

    tensors: tuple[TensorWay, ...]
    unmanaged: Mapping[str, str]  # parameters that no refit writes, and why
    tile_count: int
    fill_count: int
    seconds: float

    def of(self, way: Way) -> list[TensorWay]:
        """All tensors that go this way."""
        return [tensor for tensor in self.tensors if tensor.way == way]

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by way."""
        ways: tuple[Way, ...] = ("direct", "followed", "fallback", "unused")
        return {way: len(self.of(way)) for way in ways}

    def to_text(self) -> str:
        """For people."""
        counts = ", ".join(f"{count} {way}" for way, count in self.counts.items())
        lines = [
            f"{len(self.tensors)} catalog tensors: {counts}",
            f"{self.tile_count} tiles, {self.fill_count} fills; captured in {self.seconds:.2f} s",
        ]
        lines += _listed(f"fallback {t.name}: {t.reason}" for t in self.of("fallback"))
        unused = (t for t in self.of("unused"))
        lines += _listed(
            f"unused {t.name}" + ("" if t.asked else ": the loader never asked for it")
            for t in unused
        )
        lines += _listed(f"left to the engine {n}: {why}" for n, why in self.unmanaged.items())
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """For programs."""
        return json.dumps(
            {
                "counts": self.counts,
                "tile_count": self.tile_count,
                "fill_count": self.fill_count,
                "seconds": self.seconds,
                "tensors": [vars(tensor) for tensor in self.tensors],
                "unmanaged": dict(self.unmanaged),
            }
        )


@dataclass
class Captured:
    """A layout as an engine's own loader has it.

    `layout` and `parameters` are what a Receiver takes; tensors that go by fallback have their
    staging among the parameters, as "fallback:{name}". Then `after_commit` belongs to every refit:
    receiver() sees to it.
    """

    layout: Layout
    parameters: dict[str, torch.Tensor]
    report: CaptureReport
    load_fallback: Callable[[], None] | None = field(default=None, repr=False)
    guarded: torch.nn.Module | Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def after_commit(self) -> dict[str, Callable[[], None]]:
        """For Receiver: brings the staged tensors in with the engine's own loader."""
        if self.load_fallback is None:
            return {}
        return {"load_weights of what goes by fallback": self.load_fallback}

    def receiver(self, *, name: str, **options: Any) -> Receiver:  # noqa: ANN401
        """A Receiver of these parameters, guarded, with after_commit; `options` are its own."""
        options.setdefault("guard", self.guarded)
        more = options.pop("after_commit", None) or {}
        if callable(more):
            more = {getattr(more, "__name__", "after_commit"): more}
        options["after_commit"] = {**self.after_commit, **more}
        return Receiver(self.layout, self.parameters, name=name, **options)


def capture(
    load_weights: LoadWeights,
    parameters: torch.nn.Module | Mapping[str, torch.Tensor],
    catalog: Catalog,
    *,
    unmanaged: Sequence[str] = (),
    require_all: bool = False,
) -> Captured:
    """Learns the layout of an engine from one run of its own loader on tensors without memory.

    `load_weights` gets an iterator of (name, tensor) over the `catalog`: a ModelConfig or a
    config.json (path, folder, text, dict), TensorSpecs, or tensors by name. `parameters` are a
    module or its tensors by name, where they lie now; nothing is written to them, whatever
    happens. They may be on the meta device: then there is a layout, and nothing to bind.

    A tensor that the loader computes with, or looks into, goes by fallback, and no other. Names in
    `unmanaged` (patterns of fnmatch) may stay unwritten; `require_all`: every catalog tensor must
    be used. LayoutMismatchError: a loader that fails, writes a place twice, reaches outside, or
    leaves a place unwritten; the message names tensor, parameter, expected and found.
    """
    from transfuse._capture.run import run

    return run(load_weights, parameters, catalog, unmanaged=unmanaged, require_all=require_all)


def _listed(lines: Iterable[str]) -> list[str]:
    found = list(lines)
    rest = [f"... and {len(found) - _MANY} more"] if len(found) > _MANY else []
    return found[:_MANY] + rest
