"""One rank of a gloo group: shards a module in several ways and writes down what it holds.

Usage: fsdp2_worker.py <rank> <world> <folder>
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transfuse
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transfuse import fsdp2


class Toy(torch.nn.Module):
    """Rows that divide unevenly, one row only, a tied weight, a buffer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 8)
        self.up = torch.nn.Linear(8, 13)
        self.down = torch.nn.Linear(13, 8, bias=False)
        self.scale = torch.nn.Parameter(torch.randn(1, 8))
        self.head = torch.nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Uses every parameter."""
        hidden = self.embed(tokens) * self.scale
        return self.head(hidden + self.down(torch.relu(self.up(hidden))))


def mesh(ranks: list, names: tuple[str, ...]) -> DeviceMesh:
    return DeviceMesh("cpu", torch.tensor(ranks), mesh_dim_names=names)


def one_axis(model: Toy, world: int) -> None:
    fully_shard(model.up, mesh=mesh(list(range(world)), ("dp",)))
    fully_shard(model, mesh=mesh(list(range(world)), ("dp",)))


def columns(model: Toy, world: int) -> None:
    fully_shard(
        model,
        mesh=mesh(list(range(world)), ("dp",)),
        shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[1] == 8 else Shard(0),
    )


def hybrid(model: Toy, _world: int) -> None:
    fully_shard(model, mesh=mesh([[0, 2], [1, 3]], ("replicate", "shard")))


def with_tensor_parallel(model: Toy, _world: int) -> None:
    """FSDP after TP on one dimension: _StridedShard; 13 rows over 2 x 2."""
    whole = mesh([[0, 2], [1, 3]], ("dp", "tp"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, whole["tp"], plan)
    fully_shard(model, mesh=whole["dp"])


def in_an_arena(model: Toy, world: int) -> None:
    """Parameters whose shards are even lie in memory that readers map, the others stay."""
    one_axis(model, world)
    before = full_tensors(model)
    arena = fsdp2.move_to_arena(model)
    begin = torch.frombuffer(arena, dtype=torch.uint8).data_ptr()
    end = begin + arena.size_bytes
    for name, value in full_tensors(model).items():
        assert torch.equal(value, before[name]), name
    locals_of = {name: p.to_local() for name, p in model.named_parameters()}
    inside = {name for name, t in locals_of.items() if begin <= t.data_ptr() < end}
    assert "down.weight" in inside, inside  # 8 rows on 2 or 4 ranks


CASES: dict[str, tuple[int, Callable[[Toy, int], None]]] = {
    "one_axis": (0, one_axis),
    "columns": (0, columns),
    "in_an_arena": (0, in_an_arena),
    "hybrid": (4, hybrid),
    "with_tensor_parallel": (4, with_tensor_parallel),
}


def full_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter gathered by torch itself: the judge."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def run_case(name: str, shard: Callable[[Toy, int], None], world: int, folder: Path) -> None:
    torch.manual_seed(7)
    model = Toy()
    shard(model, world)
    # A step, so that the modules have been gathered and optimizer state exists; the root module
    # stays gathered after a forward pass without backward.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if name != "with_tensor_parallel":  # a plain embedding does not meet a DTensor's gradient
        model(torch.arange(9)).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            model(torch.arange(9))
    layout, parameters = fsdp2.layout(model, buffers=True)
    rank = dist.get_rank()
    (folder / f"{name}-{rank}.layout").write_bytes(layout.encode())
    torch.save(parameters, folder / f"{name}-{rank}.pt")
    full = full_tensors(model)
    if rank == 0:
        torch.save(full, folder / f"{name}-full.pt")


def run_experts(world: int, folder: Path) -> None:
    """Experts in stacks, as transformers 5 holds them: a rank has whole ones, or rows of all."""
    config = transfuse.parse_model_config((folder / "config.json").read_text())
    described = transfuse.make_layout(
        config, transfuse.parse_parallel_spec("hf:experts=stacked"), 0
    )
    shapes = torch.load(folder / "stacked.pt")
    assert {p.name: p.element_count for p in described.parameters} == {
        name: value.numel() for name, value in shapes.items()
    }
    for name, dim in (("experts", 0), ("expert_rows", 1)):
        model = torch.nn.Module()
        for path, value in shapes.items():
            *modules, leaf = path.split(".")
            owner = model
            for module in modules:
                if module not in dict(owner.named_children()):
                    owner.add_module(module, torch.nn.Module())
                owner = owner.get_submodule(module)
            owner.register_parameter(leaf, torch.nn.Parameter(value.clone()))
        fully_shard(
            model,
            mesh=mesh(list(range(world)), ("dp",)),
            shard_placement_fn=lambda p, d=dim: Shard(d) if p.ndim == 3 else Shard(0),
        )
        layout, parameters = fsdp2.layout(model, config=config)
        rank = dist.get_rank()
        (folder / f"{name}-{rank}.layout").write_bytes(layout.encode())
        torch.save(parameters, folder / f"{name}-{rank}.pt")


def refuse_reversed_mesh(world: int, folder: Path) -> None:
    """A mesh whose order is not that of its process group."""
    model = Toy()
    fully_shard(model, mesh=mesh(list(reversed(range(world))), ("dp",)))
    try:
        fsdp2.layout(model)
    except transfuse.UnsupportedError as error:
        (folder / f"reversed-{dist.get_rank()}.txt").write_text(str(error))


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    for name, (needed, shard) in CASES.items():
        if needed in (0, world):
            run_case(name, shard, world, folder)
    run_experts(world, folder)
    if world == 2:
        refuse_reversed_mesh(world, folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
