"""Expert maps of engines, as Python gives them."""

from __future__ import annotations

import json

import pytest
import transfuse

CONFIG = json.dumps(
    {
        "model_type": "qwen3_moe",
        "hidden_size": 8,
        "moe_intermediate_size": 4,
        "num_experts": 3,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 70,
    }
)


def layouts(spec, expert_map=None):
    spec = transfuse.parse_parallel_spec(spec)
    if expert_map is not None:
        spec = transfuse.with_expert_map(spec, expert_map)
    return transfuse.make_layouts(transfuse.parse_model_config(CONFIG), spec)


def places(layout, layer):
    """The experts in the stack of a rank, by their place."""
    tensors, name = layout.tensors, f"model.layers.{layer}.mlp.experts.w2_weight"
    found = [t for t in layout.tiles if layout.parameters[t.parameter].name == name]
    found.sort(key=lambda tile: tile.element_offset)
    return [int(tensors[t.tensor].name.split(".experts.")[1].split(".")[0]) for t in found]


def test_a_map_says_what_lies_where_and_gives_the_layout_another_identity():
    expert_map = transfuse.ExpertMap([[2, 0, 0, 1], [1, 1, 2, 0]], version=3)
    assert expert_map.version == 3
    mapped = layouts("sglang:tp=2,ep=2,redundant=1", expert_map)
    initial = layouts("sglang:tp=2,ep=2,redundant=1")
    assert [places(layout, 0) for layout in mapped] == [[2, 0], [0, 1]]
    assert [places(layout, 1) for layout in mapped] == [[1, 1], [2, 0]]
    assert [places(layout, 0) for layout in initial] == [[0, 1], [2, 0]]
    assert mapped[0].digest != initial[0].digest
    again = transfuse.parse_expert_map(
        json.dumps({"version": 3, "physical_to_logical_map": expert_map.physical_to_logical})
    )
    assert layouts("sglang:tp=2,ep=2,redundant=1", again)[0].digest == mapped[0].digest
    plan = transfuse.compile(mapped[1], layouts("hf"))
    assert plan.target.digest == mapped[1].digest


def test_a_hole_names_version_layer_and_expert():
    expert_map = transfuse.ExpertMap([[2, 0, 0, 1], [1, 1, 2, 2]], version=9)
    with pytest.raises(transfuse.InvalidArgumentError, match="version 9: layer 1: no place .* 0"):
        layouts("vllm:tp=2,ep,redundant=1", expert_map)
    with pytest.raises(transfuse.InvalidArgumentError, match="place 1 holds -1"):
        transfuse.parse_expert_map("[[0, -1]]")
