"""Layouts of real FSDP1 modules: shards of flattened parameters, carried out as a plan, give the
tensors that FSDP itself gathers."""

from __future__ import annotations

import pytest
import torch
import transfuse
from transfuse import Box, Dtype, LayoutBuilder

CASES = ["one_vector", "nested", "original", "original_gathered", "whole", "mixed"]
WORLDS = [(2, case) for case in CASES] + [(4, "one_vector"), (4, "original"), (4, "hybrid")]


@pytest.fixture(scope="module")
def group(module_children, tmp_path_factory):
    """group(n): the folder with what n ranks of one gloo group wrote; they run once."""
    folders = {}

    def run(world):
        if world not in folders:
            folders[world] = tmp_path_factory.mktemp(f"fsdp1-{world}")
            for rank in range(world):
                module_children.start("fsdp1_worker.py", rank, world, folders[world])
            module_children.join()
        return folders[world]

    return run


def load(folder, case, rank):
    layout = transfuse.Layout.decode((folder / f"{case}-{rank}.layout").read_bytes())
    return layout, torch.load(folder / f"{case}-{rank}.pt")


@pytest.mark.parametrize(("world", "case"), WORLDS)
def test_the_shards_of_all_ranks_are_the_tensors_that_fsdp_gathers(group, execute, world, case):
    folder = group(world)
    full = torch.load(folder / f"{case}-full.pt")
    assert set(full) == {"embed.weight", "apart.weight"} | {
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in ("up.weight", "up.bias", "down.weight", "mix")
    }
    builder = LayoutBuilder()
    for name, value in full.items():
        tensor = builder.tensor(name, Dtype.F32, value.shape)
        builder.tile(
            tensor, Box.whole(value.shape), builder.parameter(name, Dtype.F32, value.numel())
        )
    target = {name: torch.full((value.numel(),), float("nan")) for name, value in full.items()}
    sources = [load(folder, case, rank) for rank in range(world)]
    plan = transfuse.compile(builder.build(), [layout for layout, _ in sources])
    execute(plan, sources, target)
    for name, value in full.items():
        assert torch.equal(target[name].view(value.shape), value), name


def test_a_shard_holds_its_part_once_and_padding_is_no_tile(group):
    folder = group(4)
    layouts = [load(folder, "one_vector", rank)[0] for rank in range(4)]
    held = {}
    for layout in layouts:
        for tile in layout.tiles:
            name = layout.tensors[tile.tensor].name
            held[name] = held.get(name, 0) + tile.box.element_count
    for tensor in layouts[0].tensors:
        whole = Box.whole(tensor.shape).element_count
        everywhere = tensor.name in ("apart.weight", "steps")
        assert held[tensor.name] == whole * (4 if everywhere else 1), tensor.name
    assert "scratch" not in held


def test_layouts_that_know_nothing_of_flat_parameters_refuse_them_by_module(group):
    fsdp2, hf, plain = (group(2) / "refusals-1.txt").read_text().splitlines()
    for said in (fsdp2, hf):
        assert said == (
            "UnsupportedError: 1: is wrapped by FullyShardedDataParallel (FSDP1), which flattens "
            "parameters; use transfuse.fsdp1.layout(model)"
        )
    assert plain.startswith("InvalidArgumentError: model: expected a module with FullyShardedData")
