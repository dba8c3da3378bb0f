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


def write_model(folder, family, *, layers=3, tied=False, **other):
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
        **sizes | more | other, architectures=[name + "ForCausalLM"]
    )
    config.save_pretrained(folder)
    model = transfuse.parse_model_config((folder / "config.json").read_text())
    weights, first = {}, 1
    for tensor in transfuse.make_catalog(model):
        count = torch.Size(tensor.shape).numel()
        weights[tensor.name] = torch.arange(first, first + count).float().view(tensor.shape)
        first += count
    assert first < 2**24 or "quantization_config" in other  # exact in f32
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


@pytest.mark.parametrize(
    ("family", "tied", "world"),
    [
        ("llama", False, {"tp": 2}),
        ("llama", True, {"tp": 4, "pp": 2}),
        ("qwen2", False, {"tp": 2}),
        ("qwen2", True, {"tp": 8}),
        ("qwen3", False, {"tp": 2}),
        ("qwen3", True, {"tp": 4}),
        ("qwen3", False, {"tp": 8}),
        ("qwen3_moe", False, {"tp": 2}),
        ("qwen3_moe", False, {"tp": 4}),
        ("qwen3_moe", False, {"tp": 4, "ep": True}),
        ("qwen3_moe", True, {"tp": 2, "pp": 2, "ep": True}),
        ("qwen3_moe", False, {"tp": 2, "dp": 2, "ep": True}),
    ],
    ids=str,
)
def test_the_layout_captured_from_load_weights_is_that_of_the_formula(
    children, tmp_path, family, tied, world
):
    config, _ = write_model(tmp_path, family, tied=tied)
    options = ["dtype=f32"]
    options += [key if value is True else f"{key}={value}" for key, value in world.items()]
    spec = transfuse.parse_parallel_spec("vllm:" + ",".join(options))
    layouts = transfuse.make_layouts(config, spec)
    request = {"folder": str(tmp_path), "world": world, "size": len(layouts)}
    children.start("vllm_capture_worker.py", json.dumps(request))
    children.join()
    for rank, expected in enumerate(layouts):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert report["counts"]["fallback"] == 0, report
        captured = transfuse.Layout.decode((tmp_path / f"rank{rank}.layout").read_bytes())
        assert captured.parameters == expected.parameters
        assert captured.digest == expected.digest, f"rank {rank}"


@pytest.mark.parametrize("world", [{"tp": 2}, {"tp": 2, "ep": True}], ids=str)
def test_f8_weights_and_their_scales_lie_where_load_weights_puts_them(
    children, execute, tmp_path, world
):
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "q_lora_rank": 128,
        "kv_lora_rank": 160,  # with 32 more rows one block and a half: the last one is short
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    }
    config, numbers = write_model(tmp_path, "deepseek_v3", layers=2, **sizes)
    dtypes = {
        transfuse.Dtype.BF16: torch.bfloat16,
        transfuse.Dtype.F32: torch.float32,
        transfuse.Dtype.F8E4M3: torch.float8_e4m3fn,
    }
    weights = {}
    for tensor in transfuse.make_catalog(config):
        value = numbers[tensor.name]
        if tensor.dtype == transfuse.Dtype.F8E4M3:
            # Bytes that repeat after 113 columns: no block and no share of a rank is a multiple.
            weights[tensor.name] = (value.long() % 113).to(torch.uint8).view(dtypes[tensor.dtype])
        else:
            weights[tensor.name] = (value % 251).to(dtypes[tensor.dtype])
    torch.save(weights, tmp_path / "weights.pt")

    options = [key if value is True else f"{key}={value}" for key, value in world.items()]
    targets = transfuse.make_layouts(
        config, transfuse.parse_parallel_spec("vllm:" + ",".join(options))
    )
    request = {"folder": str(tmp_path), "world": world, "size": 2, "dtype": "bfloat16"}
    children.start("vllm_worker.py", json.dumps(request))
    children.join()
    whole = transfuse.make_layout(config, transfuse.parse_parallel_spec("hf"), 0)
    source = {name: value.flatten() for name, value in weights.items()}
    for rank, target in enumerate(targets):
        expected = torch.load(tmp_path / f"rank{rank}.pt")
        assert {p.name for p in target.parameters} == set(expected)
        assert {p.name: dtypes[p.dtype] for p in target.parameters} == {
            name: value.dtype for name, value in expected.items()
        }
        held = {
            p.name: torch.zeros(p.element_count, dtype=dtypes[p.dtype]) for p in target.parameters
        }
        execute(transfuse.compile(target, [whole]), [(whole, source)], held)
        for name, value in expected.items():
            assert torch.equal(
                held[name].view(torch.uint8), value.contiguous().flatten().view(torch.uint8)
            ), f"rank {rank}: {name}"
