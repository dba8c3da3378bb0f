"""Layouts of vLLM specs against vLLM's own load_weights on every rank. Skipped where vLLM is not
installed; its Python sources and what they import are enough, no device and no compiled part."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import transfuse

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)
transformers = pytest.importorskip("transformers")

FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 8, "num_experts": 6, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "gemma3_text": ("Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "glm4_moe": (
        "Glm4Moe",
        {
            "head_dim": 8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 6,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "use_qk_norm": True,
            "num_nextn_predict_layers": 1,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 1,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 16,  # [h, 2I] is square: no shape tells rows from columns
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            "head_dim": 8,
            "num_hidden_layers": 5,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 10,
            "linear_conv_kernel_dim": 3,
        },
    ),
}
CONFIGS = {"gemma3_text": "Gemma3TextConfig"}


def write_model(folder, family, *, layers=3, tied=False):
    """A folder as vLLM reads it, and its weights: every element has a value of its own."""
    name, more = FAMILIES[family]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    config = getattr(transformers, CONFIGS.get(family, name + "Config"))(
        **sizes | more, architectures=[name + "ForCausalLM"]
    )
    config.save_pretrained(folder)
    model = transfuse.parse_model_config((folder / "config.json").read_text())
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
        ("llama", False, {"tp": 2}),
        ("llama", True, {"tp": 2, "pp": 2}),
        ("qwen2", False, {"tp": 4}),
        ("qwen2", True, {"pp": 3}),
        ("qwen3", True, {"tp": 8}),
        ("qwen3", False, {"tp": 2, "pp": 2}),
        ("qwen3_moe", False, {"tp": 2}),
        ("qwen3_moe", False, {"tp": 4, "ep": True}),
        ("qwen3_moe", True, {"tp": 2, "pp": 2, "ep": True}),
        ("qwen3_moe", False, {"tp": 2, "dp": 2}),
        ("qwen3_moe", False, {"tp": 2, "dp": 2, "ep": True}),
        ("mixtral", False, {"tp": 4}),
        ("mixtral", False, {"tp": 2, "pp": 2, "ep": True}),
        ("gemma3_text", True, {"tp": 2, "pp": 2}),
        ("glm4_moe", False, {"tp": 4}),
        ("glm4_moe", False, {"tp": 2, "pp": 2, "ep": True}),
        ("deepseek_v3", False, {"tp": 4}),
        ("deepseek_v3", False, {"tp": 2, "pp": 2, "ep": True}),
        ("gpt_oss", False, {"tp": 4}),
        ("gpt_oss", False, {"tp": 2, "dp": 2}),
        ("gpt_oss", False, {"tp": 2, "pp": 2, "ep": True}),
        ("qwen3_next", False, {"tp": 4}),
        ("qwen3_next", False, {"tp": 2, "pp": 2, "ep": True}),
    ],
    ids=str,
)
def test_a_plan_puts_everything_where_load_weights_puts_it(
    children, execute, tmp_path, family, tied, world
):
    config, weights = write_model(tmp_path, family, tied=tied)
    options = ["dtype=f32"]
    options += [key if value is True else f"{key}={value}" for key, value in world.items()]
    spec = transfuse.parse_parallel_spec("vllm:" + ",".join(options))
    targets = transfuse.make_layouts(config, spec)
    request = {"folder": str(tmp_path), "world": world, "size": len(targets)}
    children.start("vllm_worker.py", json.dumps(request))
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
