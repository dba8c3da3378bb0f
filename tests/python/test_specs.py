"""Specs, ranks and layouts of live Megatron modules as Python sees them."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
import transfuse
from transfuse import Box, ParallelRanks, megatron
from transfuse._transfuse import flat_range_boxes

CONFIG = transfuse.parse_model_config(
    json.dumps(
        {
            "model_type": "qwen3_moe",
            "hidden_size": 8,
            "intermediate_size": 16,
            "moe_intermediate_size": 4,
            "num_experts": 4,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "vocab_size": 10,
        }
    )
)


def test_every_option_of_a_spec_can_be_read():
    spec = transfuse.parse_parallel_spec(
        "megatron:tp=2,pp=3,vpp=2,cp=2,dp=4,ep=2,etp=1,layers=1/2/0/0/0/0,vocab_divisor=64,"
        "padded_vocab=128,norms=separate,experts=sequential,replicas=2,dtype=f32"
    )
    numbers = {"tp": 2, "pp": 3, "vpp": 2, "cp": 2, "dp": 4, "ep": 2, "etp": 1, "replicas": 2}
    for name, value in numbers.items():
        assert getattr(spec, name) == value, name
    assert spec.layers == [1, 2, 0, 0, 0, 0]
    assert (spec.vocab_divisor, spec.padded_vocab) == (64, 128)
    assert spec.separate_norms
    assert spec.sequential_experts
    assert (spec.first, spec.last) == (0, 0)
    assert spec.rank_count == 2 * 2 * 4 * 3 * 2
    counted = transfuse.parse_parallel_spec("megatron:pp=2,account_for_embedding,account_for_loss")
    assert counted.account_for_embedding
    assert counted.account_for_loss
    engine = transfuse.parse_parallel_spec("vllm:tp=2,ep,placement=round_robin,w13=up_gate")
    assert engine.expert_parallel
    assert engine.round_robin
    assert engine.up_before_gate
    uneven = transfuse.parse_parallel_spec("megatron:pp=3,first=1,last=1")
    assert (uneven.first, uneven.last) == (1, 1)


def test_I7_a_layout_is_that_of_the_ranks_that_the_caller_has():
    spec = transfuse.parse_parallel_spec("megatron:tp=2,pp=3,ep=2,etp=1")
    for rank in range(spec.rank_count):
        ranks = transfuse.parallel_ranks(spec, rank)
        by_number = transfuse.make_layout(CONFIG, spec, rank)
        assert transfuse.make_layout(CONFIG, spec, ranks) == by_number
    assert transfuse.parallel_ranks(spec, 5) == ParallelRanks(tp=1, pp=2, ep=1)
    assert repr(ParallelRanks(tp=1)) == "ParallelRanks(tp=1, pp=0, dp=0, cp=0, etp=0, ep=0, edp=0)"
    with pytest.raises(transfuse.InvalidArgumentError, match="pp rank 3"):
        transfuse.make_layout(CONFIG, spec, ParallelRanks(pp=3))
    with pytest.raises(transfuse.InvalidArgumentError, match="expected 0 to 5"):
        transfuse.parallel_ranks(spec, 6)


def test_a_run_of_elements_is_a_list_of_boxes():
    assert flat_range_boxes((3, 4), 2, 9) == [
        Box((0, 2), (1, 2)),
        Box((1, 0), (1, 4)),
        Box((2, 0), (1, 1)),
    ]
    with pytest.raises(transfuse.InvalidArgumentError, match="a part of its 12"):
        flat_range_boxes((3, 4), 2, 13)


class Group:
    """A process group as far as layouts are concerned."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def test_ranks_and_sizes_come_from_the_groups_that_are_given():
    groups = types.SimpleNamespace(
        tp=Group(1, 2), pp=Group(2, 3), ep=Group(0, 2), expt_tp=Group(0, 1)
    )
    assert megatron.ranks_of(groups, CONFIG) == ParallelRanks(tp=1, pp=2)
    spec = megatron.sizes_of(groups, CONFIG, chunks=2)
    assert (spec.tp, spec.pp, spec.vpp, spec.ep, spec.etp) == (2, 3, 2, 2, 1)
    del groups.ep
    with pytest.raises(transfuse.InvalidArgumentError, match="no process group 'ep', which models"):
        megatron.ranks_of(groups, CONFIG)
    with pytest.raises(transfuse.InvalidArgumentError, match="no process group 'tp', which every"):
        megatron.sizes_of(types.SimpleNamespace(), CONFIG)


def test_what_is_no_megatron_model_is_refused():
    with pytest.raises(transfuse.InvalidArgumentError, match="found an empty list"):
        megatron.layout([], CONFIG)
    with pytest.raises(transfuse.InvalidArgumentError, match="expected a spec beside them"):
        megatron.layout(torch.nn.Linear(2, 2), CONFIG, ranks=ParallelRanks())
    arguments = {"spec": "megatron:pp=3", "ranks": ParallelRanks()}
    with pytest.raises(transfuse.LayoutMismatchError, match=r"weight: extra, \[2, 2\]"):
        megatron.layout(torch.nn.Linear(2, 2), CONFIG, **arguments)
    strange = torch.nn.Module()
    strange.decoder = torch.nn.Module()
    strange.decoder.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(transfuse.UnsupportedError, match=r"decoder.layers.0: a Linear without"):
        megatron.layout(strange, CONFIG, **arguments)


def test_without_megatron_or_its_groups_the_error_says_what_to_give(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(transfuse.NotFoundError, match="give `spec` and `ranks`, or `groups`"):
        megatron.layout(torch.nn.Linear(2, 2), CONFIG)
