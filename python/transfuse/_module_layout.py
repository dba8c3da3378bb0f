"""From the named tensors of a torch module to a Layout and the parameters that it binds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from transfuse._transfuse import (
    Box,
    Dtype,
    Layout,
    LayoutBuilder,
    ModelConfig,
    Tile,
    make_layout,
    parse_parallel_spec,
)
from transfuse.errors import InvalidArgumentError, UnsupportedError

_DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: Dtype.F32,
    torch.float16: Dtype.F16,
    torch.bfloat16: Dtype.BF16,
    torch.float8_e4m3fn: Dtype.F8E4M3,
    torch.float8_e5m2: Dtype.F8E5M2,
    torch.int8: Dtype.I8,
    torch.uint8: Dtype.U8,
    torch.int32: Dtype.I32,
    torch.int64: Dtype.I64,
}
TORCH_DTYPES: dict[Dtype, torch.dtype] = {ours: torchs for torchs, ours in _DTYPES.items()}

# What wrappers put into the names of what they wrap.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Holding:
    """What this process holds of one catalog tensor: `local` is the box of the whole.

    Where a live tensor holds several catalog tensors, `local` is a view of it for each.
    """

    name: str
    local: torch.Tensor
    shape: tuple[int, ...]
    box: Box
    live_name: str = ""  # "": the name
    live: torch.Tensor | None = None  # None: local


class PublishedNames:
    """How the modules of transformers 5 hold what a checkpoint publishes.

    They stack the experts of a layer in two tensors, and some have names of their own.
    """

    def __init__(self, config: ModelConfig | None) -> None:
        self._places: dict[str, list[tuple[str, tuple[int, ...], Tile]]] = {}
        self._sizes: dict[str, int] = {}
        if config is None or config.num_experts == 0:
            return
        modules = make_layout(config, parse_parallel_spec("hf:experts=stacked"), 0)
        for tile in modules.tiles:
            parameter, tensor = modules.parameters[tile.parameter], modules.tensors[tile.tensor]
            self._sizes[parameter.name] = parameter.element_count
            place = (tensor.name, tensor.shape, tile)
            self._places.setdefault(parameter.name, []).append(place)

    def holdings(self, live: Holding) -> Iterator[Holding]:
        """What a live tensor holds, by published names; itself where those do not differ."""
        places = self._places.get(live.name, [])
        if not places or (len(places) == 1 and places[0][0] == live.name):
            yield live
            return
        if torch.Size(live.shape).numel() != self._sizes[live.name]:
            message = f"{live.name}: the config says {self._sizes[live.name]} elements"
            raise InvalidArgumentError(f"{message}, the module has {list(live.shape)}")
        for name, shape, tile in places:
            yield _holding_of(live, name, shape, tile)


def dtype_of(name: str, tensor: torch.Tensor) -> Dtype:
    """The Dtype of a torch tensor."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        message = f"{name}: dtype {tensor.dtype} has no counterpart; these have: {list(_DTYPES)}"
        raise UnsupportedError(message)
    return dtype


def named_tensors(
    model: torch.nn.Module, *, buffers: bool, aliases: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names as the published checkpoint has them, with the tensor of each.

    Tensors that share their storage (tied weights) appear once: under the name that the model does
    not list as tied, else the first. `aliases` gives all names.
    """
    found: dict[tuple[object, ...], list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in _all_tensors(model, buffers=buffers):
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        found.setdefault(_identity(tensor), []).append((name, tensor))
    tied = _tied_names(model)
    for group in found.values():
        if aliases:
            yield from group
        else:
            yield next((entry for entry in group if entry[0] not in tied), group[0])


def refuse_flattened(model: torch.nn.Module) -> None:
    """UnsupportedError if FSDP1 wraps a part of the model: its parameters have other shapes."""
    for name, module in model.named_modules():
        if hasattr(module, "_fsdp_wrapped_module"):
            message = (
                f"{name or 'the module'}: is wrapped by FullyShardedDataParallel (FSDP1), which "
                "flattens parameters; use transfuse.fsdp1.layout(model)"
            )
            raise UnsupportedError(message)


def build_layout(holdings: Iterable[Holding]) -> tuple[Layout, dict[str, torch.Tensor]]:
    """One parameter for every span of storage; spans that interleave become one parameter."""
    builder = LayoutBuilder()
    parameters: dict[str, torch.Tensor] = {}
    present: list[Holding] = []
    for holding in holdings:
        dtype = dtype_of(holding.name, holding.local)
        if tuple(holding.local.shape) != holding.box.length:
            message = (
                f"{holding.name}: the local tensor has shape {tuple(holding.local.shape)}, "
                f"its placement says {holding.box}"
            )
            raise InvalidArgumentError(message)
        if holding.local.is_meta or holding.local.layout != torch.strided:
            message = f"{holding.name}: is {holding.local.layout} on {holding.local.device}"
            raise UnsupportedError(f"{message}; expected a dense tensor with memory")
        builder.tensor(holding.name, dtype, holding.shape)
        if holding.local.numel() > 0:
            present.append(holding)
    for group in _spans(present):
        first = min(_begin(_live(h)) for h in group)
        last = max(_end(_live(h)) for h in group)
        name = min(h.live_name or h.name for h in group)
        storage = group[0].local.detach().as_strided((last - first,), (1,), first)
        parameters[name] = storage
        parameter = builder.parameter(name, dtype_of(name, storage), last - first)
        for h in group:
            tensor = builder.tensor(h.name, dtype_of(h.name, h.local), h.shape)
            # A dimension of length 1 has any stride in torch; 1 is the one that says nothing.
            strides = [
                stride if length > 1 else 1
                for length, stride in zip(h.local.shape, h.local.stride(), strict=True)
            ]
            offset = _begin(h.local) - first
            builder.tile(tensor, h.box, parameter, offset, strides)
    return builder.build(), parameters


def _all_tensors(model: torch.nn.Module, *, buffers: bool) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    if not buffers:
        return
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _tied_names(model: torch.nn.Module) -> set[str]:
    """Names that save_pretrained leaves out: transformers lists them on the model."""
    keys = getattr(model, "_tied_weights_keys", None) or ()
    return {str(key) for key in keys}


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _holding_of(live: Holding, name: str, shape: tuple[int, ...], tile: Tile) -> Holding:
    """The part of a live tensor that is one catalog tensor, as far as this process holds it."""
    start, rest = [], tile.element_offset
    for d in range(len(live.shape)):
        below = torch.Size(live.shape[d + 1 :]).numel()
        start.append(rest // below)
        rest %= below
    outer = len(live.shape) - len(shape)  # dimensions of which the catalog tensor has one place
    length = [1] * outer + list(tile.box.length)
    begin = [max(a, b) for a, b in zip(start, live.box.offset, strict=True)]
    end = [
        max(low, min(a + n, b + m))
        for low, a, n, b, m in zip(
            begin, start, length, live.box.offset, live.box.length, strict=True
        )
    ]
    local = live.local
    empty = any(low == high for low, high in zip(begin, end, strict=True))
    for d, (low, high, offset) in enumerate(zip(begin, end, live.box.offset, strict=True)):
        local = local.narrow(d, 0 if empty else low - offset, 0 if empty else high - low)
    local = local.reshape([0] * len(shape)) if empty else local.view(local.shape[outer:])
    first = [0 if empty else a - b for a, b in zip(begin, start, strict=True)]
    box = Box(tuple(first[outer:]), tuple(local.shape))
    return Holding(name, local, shape, box, live.name, live.local)


def _live(holding: Holding) -> torch.Tensor:
    return holding.local if holding.live is None else holding.live


def _begin(tensor: torch.Tensor) -> int:
    """The first storage element of the tensor."""
    return int(tensor.storage_offset())


def _end(tensor: torch.Tensor) -> int:
    """One past the last storage element that the tensor reaches."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return _begin(tensor) + int(reach) + 1


def _spans(holdings: list[Holding]) -> Iterator[list[Holding]]:
    """Groups of holdings whose spans of one storage overlap, such as the columns of a matrix."""

    def place(h: Holding) -> tuple[int, str, int, int]:
        live = _live(h)
        storage = live.untyped_storage().data_ptr()
        return (storage, str(live.dtype), _begin(live), -_end(live))

    group: list[Holding] = []
    end = 0
    for h in sorted(holdings, key=place):
        if group and place(h)[:2] == place(group[0])[:2] and _begin(_live(h)) < end:
            group.append(h)
            end = max(end, _end(_live(h)))
            continue
        if group:
            yield group
        group = [h]
        end = _end(_live(h))
    if group:
        yield group
