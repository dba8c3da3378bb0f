"""Layouts of SGLang specs against SGLang's own load_weights on every rank. Skipped where SGLang is
not installed; its Python sources and what they import are enough, no device, no compiled part."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import transfuse

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed", allow_module_level=True)
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
GROUPED = {**EXPERTS, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "num_experts": 8, "head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "head_dim": 4, "num_experts_per_tok": 2}),
    "gemma3_text": ("Gemma3", {"head_dim": 4, "pad_token_id": 0}),
    "glm4_moe": (
        "Glm4Moe",
        {**GROUPED, "n_group": 2, "topk_group": 1, "head_dim": 4, "attention_bias": True},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **GROUPED,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 7,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 2,
            "v_head_dim": 3,
            "num_key_value_heads": 8,
        },
    ),
}


# Of 3 layers with 8 experts and 4 copies.
MAP = [
    [7, 6, 5, 4, 3, 2, 1, 0, 7, 7, 7, 0],
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7],
    [3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 0, 7],
]


def write_model(folder, family, *, layers=3, tied=False):
    """A folder as SGLang reads it, and its weights: every element has a value of its own."""
    name, more = FAMILIES[family]
    options = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "architectures": [name + "ForCausalLM"],
    }
    config_class = getattr(transformers, name + ("TextConfig" if name == "Gemma3" else "Config"))
    config_class(**{**options, **more}).save_pretrained(folder)
    path = folder / "config.json"
    if family == "deepseek_v3":  # what published files say and transformers 5 leaves out
        left_out = {"topk_method": "noaux_tc", "moe_layer_freq": 1, "scoring_func": "sigmoid"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **left_out}))
    model = transfuse.parse_model_config(path.read_text())
    weights, first = {}, 1
    for tensor in transfuse.make_catalog(model):
        count = torch.Size(tensor.shape).numel()
        weights[tensor.name] = torch.arange(first, first + count).float().view(tensor.shape)
        first += count
    assert first < 2**24  # exact in f32
    torch.save(weights, folder / "weights.pt")
    return model, weights


@pytest.mark.parametrize(
    ("family", "tied", "world"),
    [
        ("llama", False, {"tp": 4}),
        ("llama", False, {"tp": 2, "pp": 2}),
        ("llama", True, {"tp": 2}),
        ("qwen2", False, {"tp": 4}),
        ("qwen2", True, {"pp": 3}),
        ("qwen3", False, {"tp": 8, "dp": 2}),
        ("qwen3", True, {"tp": 2, "pp": 2}),
        ("qwen3", True, {"tp": 4, "dp": 2}),
        ("qwen3", False, {"tp": 4, "dp": 2, "lm_head": "attention"}),
        ("qwen3_moe", False, {"tp": 2}),
        ("qwen3_moe", False, {"tp": 4, "ep": 2}),
        ("qwen3_moe", False, {"tp": 4, "ep": 4, "dp": 2, "pp": 2}),
        ("qwen3_moe", False, {"tp": 4, "ep": 4, "redundant": 4}),
        ("qwen3_moe", False, {"tp": 4, "ep": 2, "redundant": 4, "expert_map": MAP}),
        ("mixtral", False, {"tp": 2, "ep": 2}),
        ("mixtral", False, {"tp": 4, "pp": 2}),
        ("gemma3_text", True, {"tp": 2}),
        ("glm4_moe", False, {"tp": 4, "ep": 2}),
        ("glm4_moe", False, {"tp": 4, "dp": 2, "pp": 2}),
        ("deepseek_v3", False, {"tp": 4, "ep": 2}),
        ("deepseek_v3", False, {"tp": 4, "dp": 2, "ep": 2, "redundant": 2, "pp": 2}),
    ],
    ids=str,
)
def test_a_plan_puts_everything_where_load_weights_puts_it(
    children, execute, tmp_path, family, tied, world
):
    config, weights = write_model(tmp_path, family, tied=tied)
    options = [f"{key}={value}" for key, value in world.items() if key != "expert_map"]
    spec = transfuse.parse_parallel_spec("sglang:" + ",".join(["dtype=f32", *options]))
    if "expert_map" in world:
        spec = transfuse.with_expert_map(spec, transfuse.ExpertMap(world["expert_map"]))
    targets = transfuse.make_layouts(config, spec)
    request = {"folder": str(tmp_path), "world": world, "size": len(targets)}
    children.start("sglang_worker.py", json.dumps(request))
    children.join()

    whole = transfuse.make_layout(config, transfuse.parse_parallel_spec("hf:dtype=f32"), 0)
    source = {name: value.flatten() for name, value in weights.items()}
    for rank, target in enumerate(targets):
        expected = torch.load(tmp_path / f"rank{rank}.pt")
        assert {p.name for p in target.parameters} == set(expected)
        held = {p.name: torch.zeros(p.element_count) for p in target.parameters}
        execute(transfuse.compile(target, [whole]), [(whole, source)], held)
        for name, value in expected.items():
            assert torch.equal(held[name], value.flatten()), f"rank {rank}: {name}"
