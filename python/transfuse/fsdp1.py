"""The layout of a module sharded with FSDP1 (FullyShardedDataParallel).

FSDP1 flattens the parameters of a module into one vector and cuts it evenly, wherever that falls: a
shard holds a run of elements of each, which are at most 2r-1 boxes of a tensor of r dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel

from transfuse._module_layout import dtype_of
from transfuse._transfuse import Box, Layout, LayoutBuilder, flat_range_boxes
from transfuse.errors import InvalidArgumentError, UnsupportedError

_WRAPPER = "_fsdp_wrapped_module."


def layout(
    model: torch.nn.Module, *, buffers: bool = False
) -> tuple[Layout, dict[str, torch.Tensor]]:
    """The layout of what this process holds of every parameter, and the memory to bind it to.

    Where a parameter lies follows from what FSDP itself notes of this process's shard, never from
    the world rank. What is published is the sharded storage in its own dtype (float32 under mixed
    precision): it is there whether or not parameters are gathered at the moment, and is what
    the optimizer steps. `use_orig_params` makes no difference. Tied weights appear once, under the
    name that FSDP keeps. Parameters that FSDP ignores are whole here, and with `buffers` so are the
    persistent buffers.
    """
    handles = list(_handles(model))
    if not handles:
        message = "model: expected a module with FullyShardedDataParallel in it, found none"
        raise InvalidArgumentError(message)
    builder = LayoutBuilder()
    parameters: dict[str, torch.Tensor] = {}
    flattened: set[tuple[int, str]] = set()  # module and name, as FSDP found them
    for prefix, handle in handles:
        flat = handle.flat_param
        for note in (*flat._param_infos, *flat._shared_param_infos):
            flattened.add((id(note.module), note.param_name))
        name = f"{prefix}_flat_param"
        # Without sharding (NO_SHARD) the vector itself is whole here.
        parameters[name] = getattr(flat, "_local_shard", flat).detach()
        _add_flat(builder, prefix, name, flat, parameters[name])
    for name, tensor in _others(model, flattened, buffers=buffers):
        _add_whole(builder, name, tensor)
        parameters[name] = tensor.detach().view(-1)
    return builder.build(), parameters


def _handles(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The prefix of the names below, and FSDP's own notes, of every wrapped module."""
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            handle = module._handle
            if handle is not None:
                prefix = f"{name}.".replace(_WRAPPER, "")
                yield "" if prefix == "." else prefix, handle


def _add_flat(
    builder: LayoutBuilder,
    prefix: str,
    name: str,
    flat: Any,  # noqa: ANN401
    shard: torch.Tensor,
) -> None:
    """The tiles of one flattened parameter's shard."""
    dtype = dtype_of(name, shard)
    if not shard.is_contiguous() or shard.is_meta:
        message = f"{name}: is {shard.layout} on {shard.device}; expected memory in one piece"
        raise UnsupportedError(message)
    parameter = builder.parameter(name, dtype, shard.numel())
    notes = zip(flat._fqns, flat._shapes, flat._contiguities, flat._shard_param_infos, strict=True)
    for below, shape, contiguous, held in notes:
        published = (prefix + below).replace(_WRAPPER, "")
        if not contiguous:
            message = f"{published}: was not row-major when FSDP flattened it"
            raise UnsupportedError(message)
        tensor = builder.tensor(published, dtype, tuple(shape))
        if not held.in_shard:
            continue
        offset = held.offset_in_shard
        end = held.intra_param_end_idx + 1
        for box in flat_range_boxes(tuple(shape), held.intra_param_start_idx, end):
            builder.tile(tensor, box, parameter, offset)
            offset += box.element_count


def _add_whole(builder: LayoutBuilder, name: str, tensor: torch.Tensor) -> None:
    if hasattr(tensor, "device_mesh") or not tensor.is_contiguous() or tensor.is_meta:
        message = f"{name}: expected a dense row-major tensor with memory beside FSDP's own"
        raise UnsupportedError(message)
    dtype = dtype_of(name, tensor)
    parameter = builder.parameter(name, dtype, tensor.numel())
    builder.tile(
        builder.tensor(name, dtype, tuple(tensor.shape)), Box.whole(tensor.shape), parameter
    )


def _others(
    model: torch.nn.Module, flattened: set[tuple[int, str]], *, buffers: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """What FSDP has not flattened: parameters that it was told to ignore, and buffers."""
    for prefix, module in model.named_modules():
        held = [
            (name, parameter)
            for name, parameter in module.named_parameters(recurse=False)
            if not isinstance(parameter, FlatParameter) and (id(module), name) not in flattened
        ]
        if buffers:
            held += [
                (name, buffer)
                for name, buffer in module.named_buffers(recurse=False)
                if name not in module._non_persistent_buffers_set
            ]
        for name, tensor in held:
            yield (f"{prefix}.{name}" if prefix else name).replace(_WRAPPER, ""), tensor
