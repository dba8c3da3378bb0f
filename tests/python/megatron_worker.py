"""Builds Megatron-Core's own GPTModel on every rank of a world, one after another in this process
(a process group without communication), and writes what each rank holds as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

# Megatron asks for its device by these names; here that is the CPU.
torch.Tensor.cuda = lambda self, *_, **__: self
torch.cuda.current_device = lambda: "cpu"
moe_utils.te_general_gemm = None  # 0.16 forgets to say that it is missing
if not isinstance(multi_latent_attention.TELinear, type):  # asked for with isinstance()
    multi_latent_attention.TELinear = type("Missing", (), {})
CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()


class LatentCore(DotProductAttention):
    """Megatron's attention without TransformerEngine knows one width of heads; this has no weights
    either, and takes values that are narrower than keys."""

    def __init__(self, *args, k_channels=None, v_channels=None, **kwargs):
        super().__init__(*args, **kwargs)

    def forward(self, query, key, value, attention_mask, **_):
        scores = torch.einsum("qbnd,kbnd->bnqk", query, key) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(attention_mask, float("-inf")).softmax(-1)
        return torch.einsum("bnqk,kbnd->qbnd", weights, value).flatten(2)


def experts_of(model):
    count = next(
        (model[n] for n in ("num_experts", "num_local_experts", "n_routed_experts") if n in model),
        0,
    )
    if count == 0:
        return {}
    routed = "n_routed_experts" in model
    dense = model.get("first_k_dense_replace", 0)
    width = model.get("moe_intermediate_size", model["intermediate_size"])
    shared = width * model.get("n_shared_experts", 0)
    return {
        "num_moe_experts": count,
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_layer_freq": [0] * dense + [1] * (model["num_hidden_layers"] - dense),
        "moe_router_score_function": "sigmoid" if routed else "softmax",
        "moe_router_enable_expert_bias": routed,
        "moe_router_topk": 2,
        "moe_grouped_gemm": False,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
    }


def attention_of(model):
    """Latent attention has a configuration of its own."""
    if "kv_lora_rank" not in model:
        return TransformerConfig, {"kv_channels": model["head_dim"]}
    return MLATransformerConfig, {
        "multi_latent_attention": True,
        "q_lora_rank": model["q_lora_rank"],
        "kv_lora_rank": model["kv_lora_rank"],
        "qk_head_dim": model["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": model["qk_rope_head_dim"],
        "v_head_dim": model["v_head_dim"],
        "rope_type": "rope",
        "rotary_base": 10000,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    }


def transformer_config(model, world):
    config_class, attention = attention_of(model)
    model_type = model["model_type"]
    vpp = world.get("vpp", 1)
    return config_class(
        num_layers=model["num_hidden_layers"],
        hidden_size=model["hidden_size"],
        ffn_hidden_size=model["intermediate_size"],
        num_attention_heads=model["num_attention_heads"],
        num_query_groups=model["num_key_value_heads"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model_type == "qwen2" or model.get("attention_bias", False),
        qk_layernorm=model_type.startswith(("qwen3", "deepseek"))
        or model.get("use_qk_norm", False),
        tensor_model_parallel_size=world.get("tp", 1),
        pipeline_model_parallel_size=world.get("pp", 1),
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        # Attention without TransformerEngine refuses context parallelism; the groups still have it.
        context_parallel_size=1,
        expert_model_parallel_size=world.get("ep", 1),
        expert_tensor_parallel_size=world.get("etp"),
        num_layers_in_first_pipeline_stage=world.get("first"),
        num_layers_in_last_pipeline_stage=world.get("last"),
        sequence_parallel=False,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        bf16=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layernorm_epsilon=1e-5,
        **attention,
        **experts_of(model),
    )


def chunks_of(model, world):
    config = transformer_config(model, world)
    vpp = world.get("vpp", 1)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    last = world.get("pp", 1) - 1
    multiple = 128 * world.get("tp", 1) if world.get("tp", 1) > 1 else 1
    vocabulary = -(-model["vocab_size"] // multiple) * multiple
    for chunk in range(vpp):
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=False,
            normalization="RMSNorm",
            qk_l2_norm=False,
            vp_stage=chunk if vpp > 1 else None,
        )
        for layer in spec.layer_specs if "kv_lora_rank" in model else []:
            layer.submodules.self_attention.submodules.core_attention = LatentCore
        yield GPTModel(
            config,
            spec,
            vocab_size=vocabulary,
            max_sequence_length=32,
            pre_process=pp_rank == 0 and chunk == 0,
            post_process=pp_rank == last and chunk == vpp - 1,
            share_embeddings_and_output_weights=model["tie_word_embeddings"],
            position_embedding_type="rope",
            rotary_percent=model.get("partial_rotary_factor", 1.0),
            vp_stage=chunk if vpp > 1 else None,
        )


def held_by(chunk):
    """Parameters, and the bias of the router, which is a persistent buffer."""
    yield from chunk.named_parameters()
    for name, buffer in chunk.named_buffers():
        if name.endswith(".expert_bias"):
            yield name, buffer


def rank_facts(model, world, rank, size):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    vpp = world.get("vpp", 1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=world.get("tp", 1),
        pipeline_model_parallel_size=world.get("pp", 1),
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        context_parallel_size=world.get("cp", 1),
        expert_model_parallel_size=world.get("ep", 1),
        expert_tensor_parallel_size=world.get("etp"),
        create_gloo_process_groups=False,
    )
    shapes, layers = {}, {}
    for index, chunk in enumerate(chunks_of(model, world)):
        prefix = f"{index}:" if vpp > 1 else ""
        for name, tensor in held_by(chunk):
            shapes[prefix + name] = list(tensor.shape)
        for local, layer in enumerate(chunk.decoder.layers):
            layers[f"{prefix}decoder.layers.{local}."] = layer.layer_number - 1
    ranks = {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
        "etp": parallel_state.get_expert_tensor_parallel_rank(),
    }
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return {"shapes": shapes, "layers": layers, "ranks": ranks}


def run_model(model, folder):
    """Logits of one whole model with the weights of a file."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    given = torch.load(folder / "in.pt")
    [chunk] = chunks_of(model, {})
    with torch.no_grad():
        for name, parameter in held_by(chunk):
            parameter.copy_(given["weights"].pop(name).view(parameter.shape))
        assert not given["weights"]
        tokens = given["tokens"]
        count = tokens.shape[1]
        hidden = torch.ones(1, 1, count, count, dtype=torch.bool).triu(1)
        logits = chunk(tokens, torch.arange(count)[None], hidden)
    torch.save(logits, folder / "out.pt")


def main():
    request = json.loads(sys.argv[1])
    if "run" in request:
        run_model(request["model"], Path(request["run"]))
        sys.stdout.write("FACTS {}\n")
        return
    facts = [
        rank_facts(request["model"], request["world"], rank, request["size"])
        for rank in range(request["size"])
    ]
    sys.stdout.write("FACTS " + json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
