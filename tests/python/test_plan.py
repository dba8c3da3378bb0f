"""Plans, findings and explanations as Python sees them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import transfuse
from transfuse import Box, Dtype, FindingKind, LayoutBuilder

CONFIG = json.dumps(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 100,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
)


def rows(first, count, total=8, columns=4, dtype=Dtype.F32):
    builder = LayoutBuilder()
    tensor = builder.tensor("w", dtype, (total, columns))
    parameter = builder.parameter("w", dtype, count * columns)
    builder.tile(tensor, Box((first, 0), (count, columns)), parameter)
    return builder.build()


def test_a_plan_moves_every_byte_of_the_target_once():
    plan = transfuse.compile(rows(0, 8), [rows(0, 5), rows(5, 3)])
    assert plan.size_bytes == 8 * 4 * 4
    assert sum(run.element_count for run in plan.runs) == 32
    assert sum(chunk.size_bytes for chunk in plan.chunks) == plan.size_bytes
    assert {str(layout.digest) for layout in plan.source_layouts} == {
        str(rows(0, 5).digest),
        str(rows(5, 3).digest),
    }


def test_the_key_is_known_without_compiling():
    target, sources = rows(0, 8), [rows(0, 5), rows(5, 3)]
    plan = transfuse.compile(target, sources, chunk_bytes=64)
    digests = [source.digest for source in sources]
    assert plan.key == transfuse.plan_key(target.digest, digests, chunk_bytes=64)
    assert plan.key != transfuse.plan_key(target.digest, digests, chunk_bytes=128)


def test_I1_a_gap_is_an_error_and_comes_back_as_data():
    target, sources = rows(0, 8), [rows(0, 5), rows(6, 2)]
    with pytest.raises(transfuse.LayoutMismatchError, match="w"):
        transfuse.compile(target, sources)
    (finding,) = transfuse.diagnose(target, sources)
    assert (finding.kind, finding.tensor, finding.box) == (
        FindingKind.GAP,
        "w",
        Box((5, 0), (1, 4)),
    )


def test_a_cast_that_no_refit_makes_is_found():
    findings = transfuse.diagnose(rows(0, 8, dtype=Dtype.F16), [rows(0, 8, dtype=Dtype.BF16)])
    assert FindingKind.DTYPE in {finding.kind for finding in findings}


def test_a_plan_from_specs_reaches_every_engine_rank(execute):
    config = transfuse.parse_model_config(CONFIG)
    trainers = transfuse.make_layouts(config, transfuse.parse_parallel_spec("fsdp:dp=3,dtype=bf16"))
    engines = transfuse.make_layouts(config, transfuse.parse_parallel_spec("vllm:tp=2"))
    whole = transfuse.make_layout(config, transfuse.parse_parallel_spec("hf"), 0)
    torch.manual_seed(0)
    full = {p.name: torch.randn(p.element_count).to(torch.bfloat16) for p in whole.parameters}

    def empty(layout):
        return {
            p.name: torch.zeros(p.element_count, dtype=torch.bfloat16) for p in layout.parameters
        }

    sources = []
    for layout in trainers:
        held = empty(layout)
        execute(transfuse.compile(layout, [whole]), [(whole, full)], held)
        sources.append((layout, held))
    for layout in engines:
        through_trainers, at_once = empty(layout), empty(layout)
        execute(transfuse.compile(layout, trainers), sources, through_trainers)
        execute(transfuse.compile(layout, [whole]), [(whole, full)], at_once)
        for name, value in at_once.items():
            assert torch.equal(through_trainers[name], value), name


def test_an_explanation_is_text_json_and_a_picture():
    config = transfuse.parse_model_config(CONFIG)
    trainers = transfuse.make_layouts(config, transfuse.parse_parallel_spec("fsdp:dp=2"))
    engines = transfuse.make_layouts(config, transfuse.parse_parallel_spec("vllm:tp=2"))
    plans = [transfuse.compile(engine, trainers) for engine in engines]
    explanation = transfuse.explain(
        [(f"engine{i}", plan) for i, plan in enumerate(plans)],
        [(f"trainer{i}", layout) for i, layout in enumerate(trainers)],
    )
    assert explanation.total_bytes == sum(plan.size_bytes for plan in plans)
    assert sum(pair.size_bytes for pair in explanation.pairs) == explanation.total_bytes
    assert "trainer1" in explanation.to_text()
    assert json.loads(explanation.to_json())["total_bytes"] == explanation.total_bytes
    assert ElementTree.fromstring(explanation.to_svg()).tag.endswith("svg")


def test_a_catalog_names_the_published_tensors():
    names = {t.name for t in transfuse.make_catalog(transfuse.parse_model_config(CONFIG))}
    assert len(names) == 11 * 2 + 3
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= names


def test_a_config_without_a_size_is_refused_by_field():
    config = json.loads(CONFIG)
    del config["hidden_size"]
    with pytest.raises(transfuse.InvalidArgumentError, match="hidden_size"):
        transfuse.parse_model_config(json.dumps(config))
