"""The parameters of one tensor parallel rank, and the layout that says what lies in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from transfuse._transfuse import Layout, make_layout, parse_parallel_spec
from transfuse.arena import Arena, aligned
from transfuse.captured import CaptureReport, capture
from transfuse.engine.architecture import Architecture
from transfuse.engine.loader import Loader, parameter_shapes
from transfuse.errors import InvalidArgumentError, UnsupportedError
from transfuse.session import DEFAULT_JOB

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Weights:
    """The parameters of one rank, named, fused, cut and padded as vLLM holds them.

    `layout` and `parameters` are what transfuse.Receiver takes. Parameters are [rows, columns], or
    [elements] for norms; zeros until something is loaded. They stay where they are for life: in an
    arena of the job, which peers map, or with `arena=False` in private memory; on `device`.

    `captured`: the layout is what transfuse.capture() learns from load_weights(), the engine's own
    loader, instead of the formula of the vllm spec; `report` says how. They are equal.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        rank: int = 0,
        size: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        arena: bool = True,
        device: torch.device | str = "cpu",
        captured: bool = False,
        job: str = DEFAULT_JOB,
    ) -> None:
        if dtype not in _DTYPES:
            raise UnsupportedError(f"the reference engine computes in {list(_DTYPES)}, not {dtype}")
        spec = parse_parallel_spec(f"vllm:tp={size},dtype={_DTYPES[dtype]}")
        self.architecture = architecture
        self.rank = rank
        self.size = size
        self.dtype = dtype
        self.device = torch.device(device)
        self.report: CaptureReport | None = None
        self.layout: Layout
        if captured:
            shapes = parameter_shapes(architecture.model, size)
        else:
            self.layout = make_layout(architecture.model, spec, rank)
            shapes = _shapes(self.layout)
        self.parameters: dict[str, torch.Tensor]
        if arena:
            size_bytes = sum(aligned(math.prod(s) * dtype.itemsize) for s in shapes.values())
            on_gpu = None if self.device.type == "cpu" else self.device
            memory = Arena(size_bytes, job=job, device=on_gpu)
            self.parameters = {n: memory.tensor(s, dtype) for n, s in shapes.items()}
        else:
            self.parameters = {
                n: torch.zeros(s, dtype=dtype, device=self.device) for n, s in shapes.items()
            }
        self._loader = Loader(architecture.model, self.parameters, rank, size)
        if captured:
            found = capture(self.load_weights, self.parameters, architecture.model)
            self.layout, self.report = found.layout, found.report

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes this rank's share of the tensors of a checkpoint, by HF name, one by one."""
        with torch.no_grad():
            self._loader.load_weights(weights)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies this rank's boxes out of whole tensors by HF name, cast to `dtype`."""
        catalog, parameters = self.layout.tensors, self.layout.parameters
        for tile in self.layout.tiles:
            spec = catalog[tile.tensor]
            whole = tensors.get(spec.name)
            if whole is None or tuple(whole.shape) != spec.shape:
                found = "nothing" if whole is None else f"shape {tuple(whole.shape)}"
                raise InvalidArgumentError(f"{spec.name}: expected {spec.shape}, found {found}")
            box = tile.box
            begins_and_lengths = zip(box.offset, box.length, strict=True)
            part = whole.detach()[tuple(slice(b, b + n) for b, n in begins_and_lengths)]
            flat = self.parameters[parameters[tile.parameter].name].view(-1)
            place = flat.as_strided(
                box.length, tile.element_strides, flat.storage_offset() + tile.element_offset
            )
            place.copy_(part)


def _shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """By parameter: what lies in one has rows of one length, or is a vector."""
    columns: dict[int, tuple[int, ...]] = {}
    for fill in layout.fills:
        columns[fill.parameter] = fill.length[1:]
    for tile in layout.tiles:
        columns[tile.parameter] = tile.box.length[1:]
    return {
        spec.name: (spec.element_count // math.prod(columns[index]), *columns[index])
        for index, spec in enumerate(layout.parameters)
    }
