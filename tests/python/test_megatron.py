"""Layouts of Megatron-Core specs against Megatron-Core itself: the modules that its own classes
build on every rank, and a model that computes what the checkpoint's does. Skipped where the package
is not installed."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transfuse

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
transformers = pytest.importorskip("transformers")

CLASSES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "mixtral": "Mixtral",
    "glm4_moe": "Glm4Moe",
    "deepseek_v3": "DeepseekV3",
}
# A dense layer, then experts of which one is shared.
ROUTED = {
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
EXPERTS = {
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 8},
    "mixtral": {"num_local_experts": 6},
    "glm4_moe": {
        **ROUTED,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
    "deepseek_v3": {
        **ROUTED,
        "q_lora_rank": 12,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 3,
    },
}


def model_config(model_type, *, layers=4, groups=2, tied=False, hidden=8):
    config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": groups,
        "head_dim": hidden // 8 * 2 if model_type in ("qwen3", "glm4_moe") else max(hidden // 8, 1),
        "vocab_size": 67,
        "tie_word_embeddings": tied,
    }
    if model_type == "deepseek_v3":
        config |= {"num_key_value_heads": 8, "head_dim": 2}
    return config | EXPERTS.get(model_type, {})


def expert_count(model):
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((model[name] for name in names if name in model), 0)


def layouts_of(model, world):
    """The names of Megatron's modules without TransformerEngine, which needs a GPU."""
    options = ["norms=separate", "experts=sequential", "dtype=f32"]
    options += [f"{key}={value}" for key, value in world.items()]
    spec = transfuse.parse_parallel_spec("megatron:" + ",".join(options))
    return transfuse.make_layouts(transfuse.parse_model_config(json.dumps(model)), spec)


@pytest.fixture
def ask(children):
    """ask(request): the JSON that the worker answers."""

    def run(**request):
        process = children.start("megatron_worker.py", json.dumps(request))
        children.join()
        line = next(x for x in children.output(process).splitlines() if x.startswith("FACTS "))
        return json.loads(line.removeprefix("FACTS "))

    return run


def first_tile(layout, parameter):
    wanted = layout.find_parameter(parameter)
    return next(t for t in layout.tiles if t.parameter == wanted)


def expect_place(layout, parameter, rank):
    """A row-parallel weight begins at the columns of its rank."""
    tile = first_tile(layout, parameter)
    assert tile.box.offset[1] == rank * tile.box.length[1], parameter


@pytest.mark.parametrize(
    ("model", "world"),
    [
        (model_config("llama"), {}),
        (model_config("llama", tied=True), {"tp": 2, "pp": 2}),
        (model_config("qwen2"), {"tp": 2, "pp": 2, "vpp": 2}),
        (model_config("qwen2", groups=4), {"tp": 8, "cp": 2}),
        (model_config("qwen3", groups=4), {"tp": 8}),
        (model_config("qwen3", layers=7, tied=True), {"pp": 3, "first": 2, "last": 1}),
        (model_config("qwen3", layers=10), {"pp": 3, "vpp": 2, "first": 2, "last": 4}),
        (model_config("qwen3_moe"), {"tp": 2, "ep": 3}),
        (model_config("qwen3_moe"), {"tp": 2, "ep": 2, "etp": 1}),
        (model_config("qwen3_moe"), {"tp": 2, "pp": 2, "ep": 3, "etp": 4}),
        (model_config("qwen3_moe", tied=True), {"pp": 2, "vpp": 2, "ep": 2, "etp": 2}),
        (model_config("mixtral"), {"tp": 2, "ep": 3}),
        (model_config("mixtral"), {"tp": 2, "pp": 2, "ep": 2, "etp": 1}),
        (model_config("glm4_moe"), {"tp": 2, "ep": 3}),
        (model_config("glm4_moe"), {"pp": 2, "ep": 2, "etp": 2}),
        (model_config("deepseek_v3"), {}),
        (model_config("deepseek_v3"), {"tp": 2, "ep": 3}),
        (model_config("deepseek_v3"), {"tp": 2, "pp": 2, "ep": 2, "etp": 1}),
    ],
    ids=lambda x: x.get("model_type") or ",".join(f"{k}={v}" for k, v in x.items()) or "whole",
)
def test_every_rank_has_the_parameters_that_megatron_builds(ask, model, world):
    layouts = layouts_of(model, world)
    facts = ask(model=model, world=world, size=len(layouts))
    for layout, fact in zip(layouts, facts, strict=True):
        sizes = {p.name: p.element_count for p in layout.parameters}
        assert sizes == {name: math.prod(shape) for name, shape in fact["shapes"].items()}
        for prefix, number in fact["layers"].items():
            for parameter in layout.parameters:
                if parameter.name.startswith(prefix):
                    tile = first_tile(layout, parameter.name)
                    name = layout.tensors[tile.tensor].name
                    assert name.startswith(f"model.layers.{number}."), parameter.name
            ranks = fact["ranks"]
            expect_place(layout, prefix + "self_attention.linear_proj.weight", ranks["tp"])
            router = layout.find_parameter(prefix + "mlp.router.weight")
            if router is None:
                continue
            expert = prefix + "mlp.experts.local_experts.0.linear_fc2.weight"
            expect_place(layout, expert, ranks["etp"])
            name = layout.tensors[first_tile(layout, expert).tensor].name
            first = ranks["ep"] * expert_count(model) // world.get("ep", 1)
            assert f".experts.{first}." in name


@pytest.mark.parametrize("model_type", CLASSES)
def test_megatron_computes_the_logits_of_the_checkpoint_that_a_plan_put_there(
    ask, execute, tmp_path, model_type
):
    model = model_config(model_type, layers=2, hidden=32)
    torch.manual_seed(0)
    extra = {"num_experts_per_tok": 2, "norm_topk_prob": True, "rms_norm_eps": 1e-5}
    if "n_routed_experts" in model:
        extra |= {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    config = getattr(transformers, CLASSES[model_type] + "Config")(
        **model | extra, rope_theta=10000.0, max_position_embeddings=32
    )
    checkpoint = getattr(transformers, CLASSES[model_type] + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in checkpoint.parameters():
            parameter.normal_(std=0.3)
        for name, buffer in checkpoint.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    tokens = torch.arange(12)[None] * 5 % model["vocab_size"]
    with torch.no_grad():
        expected = checkpoint(tokens).logits

    [target] = layouts_of(model, {})
    source = transfuse.make_layout(
        transfuse.parse_model_config(json.dumps(model)),
        transfuse.parse_parallel_spec("hf:dtype=f32"),
        0,
    )
    held = {p.name: torch.full((p.element_count,), float("nan")) for p in target.parameters}
    plan = transfuse.compile(target, [source])
    state = {name: value.detach().flatten() for name, value in checkpoint.state_dict().items()}
    execute(plan, [(source, state)], held)
    torch.save({"weights": held, "tokens": tokens}, tmp_path / "in.pt")
    ask(model=model, world={}, size=1, run=str(tmp_path))
    found = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
