"""Layouts of real FSDP2 modules, carried out as a plan, give torch's own gathered tensors."""

from __future__ import annotations

import json

import live_training
import pytest
import torch
import transfuse
from transfuse import Box, Dtype, LayoutBuilder

CASES = {
    2: ["one_axis", "columns", "in_an_arena"],
    4: ["one_axis", "columns", "in_an_arena", "hybrid", "with_tensor_parallel"],
}


CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "vocab_size": 7,
}


def single_experts():
    config = transfuse.parse_model_config(json.dumps(CONFIG))
    return transfuse.make_layout(config, transfuse.parse_parallel_spec("hf:dtype=f32"), 0)


def stacked_experts(spec):
    config = transfuse.parse_model_config(json.dumps(CONFIG))
    return transfuse.make_layouts(config, transfuse.parse_parallel_spec(spec))


def experts():
    """The published tensors: every element has a value of its own."""
    weights, first = {}, 1
    for tensor in single_experts().tensors:
        count = torch.Size(tensor.shape).numel()
        weights[tensor.name] = torch.arange(first, first + count).float().view(tensor.shape)
        first += count
    return weights


def write_experts(folder):
    """The same as modules of transformers 5 hold them."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    held, moe = {}, "model.layers.0.block_sparse_moe."
    weights = experts()
    for name, value in weights.items():
        if ".experts." not in name:
            held[name.replace(".block_sparse_moe.", ".mlp.")] = value
    one = [[weights[f"{moe}experts.{x}.w{w}.weight"] for w in (1, 3, 2)] for x in range(3)]
    stem = "model.layers.0.mlp.experts."
    held[stem + "gate_up_proj"] = torch.stack([torch.cat(e[:2]) for e in one])
    held[stem + "down_proj"] = torch.stack([e[2] for e in one])
    torch.save(held, folder / "stacked.pt")


@pytest.fixture(scope="module")
def group(module_children, tmp_path_factory):
    """group(n): the folder with what n ranks of one gloo group wrote; they run once."""
    folders = {}

    def run(world):
        if world not in folders:
            folders[world] = tmp_path_factory.mktemp(f"fsdp2-{world}")
            write_experts(folders[world])
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


@pytest.mark.parametrize("case", ["experts", "expert_rows"])
@pytest.mark.parametrize("world", CASES)
def test_shards_of_stacked_experts_are_the_published_tensors(group, execute, world, case):
    sources = [load(group(world), case, rank) for rank in range(world)]
    target = {p.name: torch.zeros(p.element_count) for p in single_experts().parameters}
    execute(transfuse.compile(single_experts(), [layout for layout, _ in sources]), sources, target)
    for name, value in experts().items():
        assert torch.equal(target[name].view(value.shape), value), name


@pytest.mark.parametrize("world", CASES)
def test_the_spec_of_stacked_experts_says_what_a_rank_of_fsdp2_holds(group, world):
    described = stacked_experts(f"fsdp:dp={world},experts=stacked,dtype=f32")
    for rank, expected in enumerate(described):
        layout, _ = load(group(world), "experts", rank)
        assert places(layout) == places(expected)
        held = {p.name: p.element_count for p in expected.parameters if p.element_count > 0}
        assert held == {p.name: p.element_count for p in layout.parameters}


def places(layout):
    """The tiles with names for numbers: an empty parameter has none."""
    return [
        (
            layout.tensors[tile.tensor].name,
            layout.parameters[tile.parameter].name,
            tile.box,
            tile.element_offset,
            tile.element_strides,
        )
        for tile in layout.tiles
    ]


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


def test_an_engine_follows_trainers_that_go_on_training(job, tmp_path):
    found = live_training.train_and_follow(job, tmp_path, "gloo", ["cpu", "cpu"])
    live_training.judge(found, "gloo")
