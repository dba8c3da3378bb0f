"""The layout of what one rank of a Megatron-Core trainer holds, from its live model chunks.

Megatron-Core is needed only to read ranks from its own parallel_state; modules are looked at
through names, shapes and the attributes that Megatron puts on its parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from transfuse._module_layout import dtype_of
from transfuse._transfuse import (
    Layout,
    LiveTensor,
    ModelConfig,
    ParallelRanks,
    ParallelSpec,
    make_live_layout,
    parse_parallel_spec,
)
from transfuse.errors import InvalidArgumentError, NotFoundError, UnsupportedError

_LAYER = re.compile(r"decoder\.layers\.(\d+)")
# Groups of a ProcessGroupCollection: name there, option of a spec, needed for what.
_GROUPS = (
    ("tp", "tp", "every model"),
    ("pp", "pp", "every model"),
    ("ep", "ep", "models with experts"),
    ("expt_tp", "etp", "models with experts"),
    ("cp", "cp", ""),
    ("dp", "dp", ""),
    ("expt_dp", "edp", ""),
)


def layout(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    config: ModelConfig,
    *,
    spec: ParallelSpec | str | None = None,
    ranks: ParallelRanks | None = None,
    groups: object | None = None,
) -> tuple[Layout, dict[str, torch.Tensor]]:
    """The layout of this rank's model chunks, and the memory to bind it to.

    `model` is the module, or the list of model chunks, with or without the wrappers of Megatron
    (DistributedDataParallel, Float16Module). `config` is that of the published checkpoint. Names,
    dtypes, padding of the vocabulary and layer numbers are those of the module, so that every
    division of layers works; with a `spec` the division is compared with what the spec says.

    Sizes and places of the parallel groups: `spec` and `ranks` of the caller; else `groups`, such
    as a ProcessGroupCollection; else megatron.core.parallel_state. Never the world rank.

    LayoutMismatchError names every tensor whose shape, partition or layer is not what `config` and
    the sizes mean, and every one that is missing or extra. The returned tensors are flat views of
    the module's own storage: pass them to Publisher or Receiver as `parameters`.
    """
    chunks = [_unwrapped(chunk) for chunk in _chunks(model)]
    layers_of_module = spec is None
    if isinstance(spec, str):
        spec = parse_parallel_spec(spec)
    if spec is None:
        if ranks is not None:
            message = "ranks: expected a spec beside them, which says how large the groups are"
            raise InvalidArgumentError(message)
        spec = sizes_of(groups, config, chunks=len(chunks))
    if ranks is None:
        ranks = ranks_of(groups, config)
    tensors: list[LiveTensor] = []
    parameters: dict[str, torch.Tensor] = {}
    for index, chunk in enumerate(chunks):
        prefix = f"{index}:" if len(chunks) > 1 else ""
        for name, tensor in _named_tensors(chunk):
            tensors.append(_described(prefix + name, tensor))
            parameters[prefix + name] = tensor.detach().view(-1)
    layers = [_layer_numbers(chunk) for chunk in chunks]
    found = make_live_layout(
        config, spec, ranks, tensors, layers, layers_of_module=layers_of_module
    )
    return found, parameters


def ranks_of(groups: object | None, config: ModelConfig) -> ParallelRanks:
    """This process's places in `groups`, or in megatron.core.parallel_state where that is None."""
    places = {option: rank for option, rank, _ in _places(groups, config)}
    return ParallelRanks(**places)


def sizes_of(groups: object | None, config: ModelConfig, *, chunks: int = 1) -> ParallelSpec:
    """The spec of these groups, without a division of layers."""
    sizes = [f"{option}={size}" for option, _, size in _places(groups, config) if option != "edp"]
    return parse_parallel_spec(",".join([f"megatron:vpp={chunks}", *sizes]))


def _places(groups: object | None, config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Option, rank and size of every group that there is."""
    if groups is None:
        groups = _collection_of_parallel_state()
    for name, option, needed in _GROUPS:
        group: Any = getattr(groups, name, None)
        if group is not None:
            yield option, int(group.rank()), int(group.size())
        elif needed == "every model" or (needed and config.num_experts > 0):
            message = f"groups: has no process group {name!r}, which {needed} need"
            raise InvalidArgumentError(message.replace("every model need", "every model needs"))
        elif option == "etp":
            yield option, 0, 1  # of a model without experts: where 'tp' is not its default


def _collection_of_parallel_state() -> object:
    try:
        from megatron.core import parallel_state
        from megatron.core.process_groups_config import ProcessGroupCollection
    except ImportError as error:
        message = "megatron.core is not installed: give `spec` and `ranks`, or `groups`"
        raise NotFoundError(message) from error
    if not parallel_state.model_parallel_is_initialized():
        message = (
            "megatron.core.parallel_state is not initialized: call initialize_model_parallel(), or "
            "give `spec` and `ranks`, or `groups`"
        )
        raise InvalidArgumentError(message)
    wanted = [name for name, _, _ in _GROUPS]
    collection: object = ProcessGroupCollection.use_mpu_process_groups(required_pgs=wanted)
    return collection


def _chunks(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    if not chunks:
        message = "model: expected a module or a list of model chunks, found an empty list"
        raise InvalidArgumentError(message)
    return chunks


def _unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    """Without Megatron's wrappers, which all keep what they wrap as `module`."""
    inner = getattr(chunk, "module", None)
    return _unwrapped(inner) if isinstance(inner, torch.nn.Module) else chunk


def _named_tensors(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, such as the bias of a router."""
    yield from chunk.named_parameters()
    for prefix, module in chunk.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _described(name: str, tensor: torch.Tensor) -> LiveTensor:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        message = f"{name}: is a {type(tensor).__name__}; expected a plain tensor"
        raise UnsupportedError(message)
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_contiguous():
        message = f"{name}: is {tensor.layout} on {tensor.device}, strides {tensor.stride()}"
        raise UnsupportedError(f"{message}; expected a dense row-major tensor with memory")
    return LiveTensor(
        name,
        dtype_of(name, tensor),
        tuple(tensor.shape),
        tensor_model_parallel=bool(getattr(tensor, "tensor_model_parallel", False)),
        partition_dim=int(getattr(tensor, "partition_dim", -1)),
        partition_stride=int(getattr(tensor, "partition_stride", 1)),
    )


def _layer_numbers(chunk: torch.nn.Module) -> list[int]:
    """The number in the whole model of every decoder layer of a chunk, as the layer itself says."""
    numbers: dict[int, int] = {}
    for name, module in chunk.named_modules():
        place = _LAYER.fullmatch(name)
        if place is None:
            continue
        number = getattr(module, "layer_number", None)
        if not isinstance(number, int):
            message = f"{name}: a {type(module).__name__} without layer_number"
            raise UnsupportedError(f"{message}; expected a TransformerLayer of Megatron-Core")
        numbers[int(place[1])] = number - 1
    return [numbers[index] for index in sorted(numbers)]
