"""Layouts of real FSDP2 modules, carried out as a plan, give torch's own gathered tensors."""

from __future__ import annotations

import pytest
import torch
import transfuse
from transfuse import Box, Dtype, LayoutBuilder

CASES = {
    2: ["one_axis", "columns", "in_an_arena"],
    4: ["one_axis", "columns", "in_an_arena", "hybrid", "with_tensor_parallel"],
}


@pytest.fixture(scope="module")
def group(module_children, tmp_path_factory):
    """group(n): the folder with what n ranks of one gloo group wrote; they run once."""
    folders = {}

    def run(world):
        if world not in folders:
            folders[world] = tmp_path_factory.mktemp(f"fsdp2-{world}")
            for rank in range(world):
                module_children.start("fsdp2_worker.py", rank, world, folders[world])
            module_children.join()
        return folders[world]

    return run


def load(folder, case, rank):
    layout = transfuse.Layout.decode((folder / f"{case}-{rank}.layout").read_bytes())
    return layout, torch.load(folder / f"{case}-{rank}.pt")


def whole_layout(tensors, dtype):
    builder = LayoutBuilder()
    for name, value in tensors.items():
        tensor = builder.tensor(name, dtype, value.shape)
        parameter = builder.parameter(name, dtype, value.numel())
        builder.tile(tensor, Box.whole(value.shape), parameter)
    return builder.build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["same", "cast"])
@pytest.mark.parametrize(("world", "case"), [(w, case) for w in CASES for case in CASES[w]])
def test_the_shards_of_all_ranks_are_the_full_tensors_bit_for_bit(
    group, execute, world, case, dtype
):
    folder = group(world)
    ours = {torch.float32: Dtype.F32, torch.bfloat16: Dtype.BF16}[dtype]
    full = torch.load(folder / f"{case}-full.pt")
    sources = [load(folder, case, rank) for rank in range(world)]
    target = {name: torch.zeros(v.numel(), dtype=dtype) for name, v in full.items()}
    plan = transfuse.compile(whole_layout(full, ours), [layout for layout, _ in sources])
    execute(plan, sources, target)
    for name, value in full.items():
        assert torch.equal(target[name].view(value.shape), value.to(dtype)), name


def test_I7_the_coordinate_on_the_mesh_decides_not_the_world_rank(group):
    folder = group(4)

    def first_row(rank):
        layout = load(folder, "hybrid", rank)[0]
        tensor = layout.find_tensor("embed.weight")
        return next(tile.box.offset[0] for tile in layout.tiles if tile.tensor == tensor)

    assert [first_row(rank) for rank in range(4)] == [0, 0, 5, 5]


def test_a_mesh_that_torch_itself_reads_in_another_order_is_refused(group):
    folder = group(2)
    for rank in range(2):
        assert "ascending" in (folder / f"reversed-{rank}.txt").read_text()


def test_an_empty_shard_is_no_tile_but_its_tensor_is_known(group):
    layout, parameters = load(group(4), "one_axis", 3)
    scale = layout.find_tensor("scale")
    assert scale is not None
    assert all(tile.tensor != scale for tile in layout.tiles)
    assert "scale" not in parameters


def test_replicas_of_a_hybrid_mesh_have_equal_layouts(group):
    folder = group(4)
    digests = [load(folder, "hybrid", rank)[0].digest for rank in range(4)]
    assert digests[0] == digests[1]
    assert digests[2] == digests[3]
    assert digests[0] != digests[2]


def test_a_tied_weight_appears_under_one_name_and_buffers_on_request(group):
    layout, _ = load(group(2), "one_axis", 0)
    names = {tensor.name for tensor in layout.tensors}
    assert "embed.weight" in names
    assert "head.weight" not in names
    assert "steps" in names
    assert "scratch" not in names
