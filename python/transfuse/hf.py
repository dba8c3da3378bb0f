"""The layout of a plain torch module, such as a transformers model: whole tensors by name."""

from __future__ import annotations

import torch

from transfuse._device import gpu_of
from transfuse._module_layout import (
    Holding,
    PublishedNames,
    build_layout,
    named_tensors,
    refuse_flattened,
)
from transfuse._transfuse import Box, Layout, ModelConfig
from transfuse.arena import Arena, aligned
from transfuse.errors import InvalidArgumentError
from transfuse.session import DEFAULT_JOB


def layout(
    model: torch.nn.Module,
    *,
    buffers: bool = False,
    aliases: bool = False,
    config: ModelConfig | None = None,
) -> tuple[Layout, dict[str, torch.Tensor]]:
    """The layout of every named parameter, and the memory to bind it to.

    Tied weights appear once, under the published name: a tied `lm_head.weight` is not in the
    catalog. `aliases` offers them under all their names, for a target that holds them apart.
    `buffers` adds the persistent ones. With a `config` (transfuse.parse_model_config) the layout is
    by the names of the published checkpoint where the module has others: transformers 5 stacks the
    experts of a layer in two tensors, `experts.gate_up_proj` and `experts.down_proj`.
    The returned tensors are flat views of the model's own storage: pass them to Publisher or
    Receiver as `parameters`.
    """
    refuse_flattened(model)
    published = PublishedNames(config)
    holdings: list[Holding] = []
    for name, tensor in named_tensors(model, buffers=buffers, aliases=aliases):
        if hasattr(tensor, "device_mesh"):
            message = f"{name}: is a DTensor; use transfuse.fsdp2.layout(model)"
            raise InvalidArgumentError(message)
        shape = tuple(tensor.shape)
        holdings += published.holdings(Holding(name, tensor.detach(), shape, Box.whole(shape)))
    return build_layout(holdings)


def move_to_arena(model: torch.nn.Module, *, job: str = DEFAULT_JOB) -> Arena:
    """Moves the parameters into memory that readers map: the best route on one host, on its GPU.

    Call it before the optimizer is made. Every parameter gets memory of its own, tied ones share
    theirs. The values do not change.
    """
    parameters = list(model.parameters())
    size_bytes = sum(aligned(p.nbytes) for p in parameters)
    arena = Arena(max(1, size_bytes), job=job, device=gpu_of(parameters))
    with torch.no_grad():
        for parameter in parameters:
            place = arena.tensor(parameter.shape, parameter.dtype)
            place.copy_(parameter)
            parameter.data = place
    return arena
