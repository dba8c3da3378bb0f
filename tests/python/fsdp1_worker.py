"""One rank of a gloo group: wraps a module with FSDP1 in several ways, trains it a step, and writes
down what it holds.

Usage: fsdp1_worker.py <rank> <world> <folder>
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transfuse
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transfuse import fsdp1, fsdp2, hf


class Block(torch.nn.Module):
    """Sizes that no number of ranks divides, in one to three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(7, 13)
        self.down = torch.nn.Linear(13, 7, bias=False)
        self.mix = torch.nn.Parameter(torch.randn(3, 5, 7))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Uses every parameter."""
        return self.down(torch.relu(self.up(hidden))) + hidden * self.mix.sum((0, 1))


class Toy(torch.nn.Module):
    """Blocks, a tied weight, a parameter to be ignored, a buffer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 7)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.apart = torch.nn.Linear(7, 7, bias=False)
        self.head = torch.nn.Linear(7, 9, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Uses every parameter."""
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.apart(hidden.float()).to(hidden.dtype))


def cases(world: int) -> dict[str, dict]:
    nested = {"auto_wrap_policy": ModuleWrapPolicy({Block})}
    found = {
        "one_vector": {},
        "nested": nested,
        "original": {**nested, "use_orig_params": True},
        "original_gathered": {
            **nested,
            "use_orig_params": True,
            "sharding_strategy": ShardingStrategy.SHARD_GRAD_OP,
        },
        "whole": {**nested, "sharding_strategy": ShardingStrategy.NO_SHARD},
        "mixed": {**nested, "mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)},
    }
    if world == 4:
        found["hybrid"] = {
            **nested,
            "sharding_strategy": ShardingStrategy.HYBRID_SHARD,
            "device_mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("rep", "shard")),
        }
    return found


def trained(options: dict) -> FullyShardedDataParallel:
    """After one real step of an optimizer that was made from the wrapped module."""
    torch.manual_seed(5)
    model = Toy()
    wrapped = FullyShardedDataParallel(
        model, ignored_modules=[model.apart], device_id=torch.device("cpu"), **options
    )
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    torch.manual_seed(6)  # equal data: the ignored module stays equal on all ranks
    wrapped(torch.randint(0, 9, (4, 3))).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return wrapped


def said(call: object, model: torch.nn.Module) -> str:
    try:
        call(model)
    except transfuse.TransfuseError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    for name, options in cases(world).items():
        model = trained(options)
        layout, parameters = fsdp1.layout(model, buffers=True)
        (folder / f"{name}-{rank}.layout").write_bytes(layout.encode())
        torch.save(
            {key: value.clone() for key, value in parameters.items()}, folder / f"{name}-{rank}.pt"
        )
        with FullyShardedDataParallel.summon_full_params(model):
            full = {
                key.replace("_fsdp_wrapped_module.", ""): value.detach().clone()
                for key, value in model.named_parameters()
            }
        if rank == 0:
            torch.save(full, folder / f"{name}-full.pt")
    outer = torch.nn.Sequential(torch.nn.Linear(2, 2), trained({}))
    refusals = [said(module.layout, outer) for module in (fsdp2, hf)]
    refusals.append(said(fsdp1.layout, torch.nn.Linear(2, 2)))
    (folder / f"refusals-{rank}.txt").write_text("\n".join(refusals))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
