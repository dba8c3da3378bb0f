"""Warm cycles at the full number of tensors, with weights that change, through real publishers and
receivers: where a buffer of the cycle before could be taken for new (I6)."""

from __future__ import annotations

import json

import pytest
import torch
import transfuse

DENSE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 36,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "vocab_size": 151,
    "tie_word_embeddings": True,
}
EXPERTS = {
    **DENSE,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "moe_intermediate_size": 8,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "tie_word_embeddings": False,
}


def layouts(config, spec):
    return transfuse.make_layouts(config, transfuse.parse_parallel_spec(spec))


def empty(layout):
    return {p.name: torch.zeros(p.element_count, dtype=torch.bfloat16) for p in layout.parameters}


def weights(config, cycle):
    """Every element depends on its place, its tensor and the cycle; small integers are exact."""
    return {
        tensor.name: (
            (torch.arange(torch.Size(tensor.shape).numel()) * 7 + number * 3 + cycle * 31) % 251
        ).to(torch.bfloat16)
        for number, tensor in enumerate(transfuse.make_catalog(config))
    }


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("megatron:tp=1", "vllm:tp=2"),
        ("megatron:tp=2", "vllm:tp=1"),
        ("megatron:tp=2", "vllm:tp=4"),
        ("fsdp:dp=2", "sglang:tp=4"),
    ],
)
def test_i6_every_warm_cycle_brings_the_weights_of_its_version(job, execute, source, target):
    config = transfuse.parse_model_config(json.dumps(DENSE))
    assert len(transfuse.make_catalog(config)) == 398
    whole = layouts(config, "hf")[0]
    trainers = layouts(config, source)
    held = [empty(layout) for layout in trainers]
    publishers = [
        transfuse.Publisher(
            layout, memory, name=f"trainer{rank}", job=job, source_count=len(trainers)
        )
        for rank, (layout, memory) in enumerate(zip(trainers, held, strict=True))
    ]
    from_whole = [transfuse.compile(layout, [whole]) for layout in trainers]
    # The first and the last rank: pieces of every kind, and both ends of what is cut.
    engines = layouts(config, target)
    ranks = sorted({0, len(engines) - 1})
    got = {rank: empty(engines[rank]) for rank in ranks}
    receivers = {
        rank: transfuse.Receiver(engines[rank], got[rank], name=f"engine{rank}", job=job)
        for rank in ranks
    }
    to_engine = {rank: transfuse.compile(engines[rank], [whole]) for rank in ranks}
    for cycle in range(1, 4):
        published = weights(config, cycle)
        for publisher in publishers:
            publisher.begin_write(cycle)
        for plan, memory in zip(from_whole, held, strict=True):
            execute(plan, [(whole, published)], memory)
        for publisher in publishers:
            publisher.publish(cycle)
        for rank, receiver in receivers.items():
            report = receiver.refit(exactly=cycle, timeout_s=60)
            assert report.planned == (cycle == 1)
            assert report.verified_bytes == report.size_bytes
            expected = empty(engines[rank])
            execute(to_engine[rank], [(whole, published)], expected)
            for name, value in expected.items():
                assert torch.equal(got[rank][name], value), f"cycle {cycle} rank {rank}: {name}"
    for member in [*receivers.values(), *publishers]:
        member.close()


def test_i6_18867_tensors_go_to_an_engine_and_back_cycle_after_cycle(job):
    config = transfuse.parse_model_config(json.dumps(EXPERTS))
    assert len(transfuse.make_catalog(config)) == 18867
    whole = layouts(config, "hf")[0]
    engines = layouts(config, "vllm:tp=4,ep")
    weights_there, weights_back = empty(whole), empty(whole)
    ranks = [empty(layout) for layout in engines]
    trainer = transfuse.Publisher(whole, weights_there, name="trainer0", job=job, model="there")
    receivers = [
        transfuse.Receiver(layout, memory, name=f"engine{rank}", job=job, model="there")
        for rank, (layout, memory) in enumerate(zip(engines, ranks, strict=True))
    ]
    publishers = [
        transfuse.Publisher(
            layout, memory, name=f"engine{rank}", job=job, model="back", source_count=len(engines)
        )
        for rank, (layout, memory) in enumerate(zip(engines, ranks, strict=True))
    ]
    home = transfuse.Receiver(whole, weights_back, name="home", job=job, model="back")
    for cycle in range(1, 4):
        trainer.begin_write(cycle)
        for name, value in weights(config, cycle).items():
            weights_there[name].copy_(value)
        trainer.publish(cycle)
        for publisher in publishers:
            publisher.begin_write(cycle)
        for receiver in receivers:
            assert receiver.refit(exactly=cycle, timeout_s=60).planned == (cycle == 1)
        for publisher in publishers:
            publisher.publish(cycle)
        assert home.refit(exactly=cycle, timeout_s=60).planned == (cycle == 1)
        for name, value in weights_there.items():
            assert torch.equal(weights_back[name], value), f"cycle {cycle}: {name}"
    for member in [home, *receivers, *publishers, trainer]:
        member.close()
