"""The layout of a module sharded with FSDP2 (fully_shard) or any DTensor parallelism."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from transfuse._device import gpu_of
from transfuse._module_layout import (
    Holding,
    PublishedNames,
    build_layout,
    named_tensors,
    refuse_flattened,
)
from transfuse._transfuse import Box, Layout, ModelConfig, Placement, PlacementKind, dtensor_box
from transfuse.arena import Arena, aligned
from transfuse.errors import UnsupportedError
from transfuse.session import DEFAULT_JOB


def layout(
    model: torch.nn.Module,
    *,
    buffers: bool = False,
    aliases: bool = False,
    config: ModelConfig | None = None,
) -> tuple[Layout, dict[str, torch.Tensor]]:
    """The layout of what this process holds of every parameter, and the memory to bind it to.

    Where a parameter lies follows from its own device mesh and this process's coordinate on it,
    never from the world rank. Parameters that are no DTensors are whole here. FSDP modules that are
    gathered at the moment are resharded first: what is published is the sharded storage. Tied
    weights, `aliases`, `buffers`, `config` and the tensors returned: see transfuse.hf.layout().
    """
    refuse_flattened(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    published = PublishedNames(config)
    holdings: list[Holding] = []
    for name, tensor in named_tensors(model, buffers=buffers, aliases=aliases):
        shape = tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            holdings += published.holdings(Holding(name, tensor.detach(), shape, Box.whole(shape)))
            continue
        box = box_of(name, tensor)
        if box is not None:
            live = Holding(name, tensor.to_local().detach(), shape, box)
            holdings += published.holdings(live)
    return build_layout(holdings)


def move_to_arena(model: torch.nn.Module, *, job: str = DEFAULT_JOB) -> Arena:
    """Moves the sharded parameters into memory that readers map: the best route on one host.

    Call it after fully_shard() and before the optimizer is made. FSDP2 itself pads shards that are
    shorter than those of the other ranks and keeps them in memory of its own: they stay there, and
    are read as the caller's memory. The values do not change.
    """
    shards = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
    size_bytes = sum(aligned(shard.nbytes) for shard in shards)
    arena = Arena(max(1, size_bytes), job=job, device=gpu_of(shards))
    moved: dict[int, torch.Tensor] = {}  # by parameter: a tied one is met more than once

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        local = tensor.to_local()
        place = moved.get(id(tensor))
        if place is None:
            place = arena.tensor(local.shape, local.dtype)
            place.copy_(local)
            moved[id(tensor)] = place
        return DTensor.from_local(
            place,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    with torch.no_grad():
        model._apply(move)
    return arena


def box_of(name: str, tensor: DTensor) -> Box | None:
    """The box that this process holds of a DTensor; None where it is not on the tensor's mesh."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    # Torch cuts and gathers by rank in the axis's process group, which is ordered by world rank; a
    # mesh in another order names other places than the data has.
    places = [mesh.get_local_rank(axis) for axis in range(mesh.ndim)]
    if places != list(coordinate):
        message = (
            f"{name}: the coordinate {tuple(coordinate)} of this process on its mesh is not its "
            f"place {tuple(places)} in the groups: list the ranks of every mesh axis ascending"
        )
        raise UnsupportedError(message)
    placements = [_placement(name, placement) for placement in tensor.placements]
    return dtensor_box(tuple(tensor.shape), placements, list(mesh.shape), coordinate)


def _placement(name: str, placement: TorchPlacement) -> Placement:
    if isinstance(placement, _StridedShard):
        return Placement(PlacementKind.STRIDED_SHARD, placement.dim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Placement(PlacementKind.SHARD, placement.dim)
    if isinstance(placement, Replicate):
        return Placement(PlacementKind.REPLICATE)
    message = f"{name}: placement {placement} cannot be transferred; expected Shard or Replicate"
    raise UnsupportedError(message)
