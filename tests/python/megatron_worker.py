"""Builds Megatron-Core's own GPTModel on every rank of a world, one after another in this process
(a process group without communication), and says what each rank holds: JSON, line for line."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
import transfuse
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore
from transfuse import megatron, torch_optimizer
from transfuse.demo.rl.megatron_trainer import CudaIsCpu

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


def experts_of(model, world):
    count = next(
        (model[n] for n in ("num_experts", "num_local_experts", "n_routed_experts") if n in model),
        0,
    )
    if count == 0:
        return {}
    routed = "n_routed_experts" in model or world.get("expert_bias", False)
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
        account_for_embedding_in_pipeline_split=world.get("account_for_embedding", False),
        account_for_loss_in_pipeline_split=world.get("account_for_loss", False),
        pipeline_model_parallel_layout=world.get("stages"),
        sequence_parallel=False,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        bf16=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layernorm_epsilon=1e-5,
        **attention,
        **experts_of(model, world),
    )


def chunks_of(model, world):
    config = transformer_config(model, world)
    vpp = world.get("vpp", 1)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    last = world.get("pp", 1) - 1
    multiple = 128 * world.get("tp", 1) if world.get("tp", 1) > 1 else 1
    vocabulary = world.get("padded_vocab", -(-model["vocab_size"] // multiple) * multiple)
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


@contextlib.contextmanager
def parallel_world(world, rank, size):
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
        order=world.get("order", "tp-cp-ep-dp-pp"),
    )
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def layout_of(chunks, model, **given):
    """The live layout, in hexadecimal, or the error."""
    config = transfuse.parse_model_config(json.dumps(model))
    try:
        layout, parameters = megatron.layout(chunks, config, **given)
    except transfuse.TransfuseError as error:
        return f"{type(error).__name__}: {error}"
    for name, parameter in parameters.items():
        prefix, _, rest = name.rpartition(":")
        held = dict(held_by(chunks[int(prefix or 0)]))[rest]
        assert parameter.data_ptr() == held.data_ptr()
        assert parameter.shape == (held.numel(),)
    return layout.encode().hex()


def rank_facts(model, world, rank, size, spec):
    with parallel_world(world, rank, size):
        vpp = world.get("vpp", 1)
        shapes, layers = {}, {}
        chunks = list(chunks_of(model, world))
        for index, chunk in enumerate(chunks):
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
        groups = ProcessGroupCollection.use_mpu_process_groups()
        # From parallel_state alone, from a spec as well, and from arguments alone.
        given = [{}, {"spec": spec, "groups": groups}]
        given.append({"spec": spec, "ranks": transfuse.ParallelRanks(**ranks)})
        live = [layout_of(chunks, model, **arguments) for arguments in given]
        return {"shapes": shapes, "layers": layers, "ranks": ranks, "live": live}


def changed_layouts(request):
    """What is said of a module after each of some changes of its parameters' data."""
    model, world = request["model"], request["world"]
    config_given = request.get("config", model)
    with parallel_world(world, request["rank"], request["size"]):
        said = []
        for change in request["changes"]:
            chunks = list(chunks_of(model, world))
            given = {"spec": change["spec"]} if "spec" in change else {}
            if "parameter" in change:
                module, _, name = change["parameter"].rpartition(".")
                owner = chunks[0].get_submodule(module)
                parameter = getattr(owner, name)
                if "shape" in change:
                    parameter.data = torch.zeros(change["shape"])
                if "dtype" in change:
                    parameter.data = parameter.data.to(getattr(torch, change["dtype"]))
                if change.get("transposed"):
                    parameter.data = parameter.data.t().contiguous().t()
                if change.get("meta"):
                    setattr(owner, name, torch.nn.Parameter(parameter.to("meta")))
                if change.get("deleted"):
                    delattr(owner, name)
                for attribute, value in change.get("attributes", {}).items():
                    setattr(parameter, attribute, value)
            if "layer_number" in change:
                chunks[0].decoder.layers[0].layer_number = change["layer_number"]
            config = {**config_given, **change.get("config", {})}
            said.append(layout_of(chunks, config, **given))
    return said


def run_model(model, folder):
    """Logits of one whole model with the weights of a file."""
    given = torch.load(folder / "in.pt")
    with parallel_world({}, 0, 1), torch.no_grad():
        [chunk] = chunks_of(model, {})
        for name, parameter in held_by(chunk):
            parameter.copy_(given["weights"].pop(name).view(parameter.shape))
        assert not given["weights"]
        tokens = given["tokens"]
        count = tokens.shape[1]
        hidden = torch.ones(1, 1, count, count, dtype=torch.bool).triu(1)
        logits = chunk(tokens, torch.arange(count)[None], hidden)
    torch.save(logits, folder / "out.pt")


def trained(model, job, *, half):
    """Versions that an engine's copy gets from Megatron-Core's own optimizer, step by step."""
    with parallel_world({}, 0, 1), CudaIsCpu():
        config = transformer_config(model, {})
        config.bf16 = half
        [inner] = chunks_of(model, {})
        chunk = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(use_distributed_optimizer=False),
            Float16Module(config, inner) if half else inner,
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="sgd", lr=0.5, bf16=half, clip_grad=0.0),
            [chunk],
            use_gloo_process_groups=False,
        )
        layout, parameters = megatron.layout(chunk, transfuse.parse_model_config(json.dumps(model)))
        held = {name: torch.zeros_like(value) for name, value in parameters.items()}
        before = {name: value.clone() for name, value in parameters.items()}
        tokens = torch.arange(12)[None] * 5 % model["vocab_size"]
        hidden = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(1)
        publisher = transfuse.Publisher(layout, parameters, name="trainer0", job=job)
        receiver = transfuse.Receiver(layout, held, name="engine0", job=job)
        facts = {"optimizer": type(optimizer.chained_optimizers[0]).__name__, "versions": []}
        with publisher, receiver:
            with torch_optimizer.attach(optimizer, publisher):
                for _ in range(2):
                    chunk.zero_grad_buffer()
                    optimizer.zero_grad()
                    logits = chunk(tokens, torch.arange(12)[None], hidden)
                    logits.float().square().mean().backward()
                    finalize_model_grads([chunk])
                    optimizer.step()
                    version = receiver.refit(timeout_s=30).version
                    equal = all(torch.equal(held[n], value) for n, value in parameters.items())
                    facts["versions"].append([version, equal])
            optimizer.step()
            facts["versions"].append([publisher.version, True])
        facts["moved"] = sum(not torch.equal(before[n], held[n]) for n in held) / len(held)
        facts["dtypes"] = sorted({str(value.dtype) for value in held.values()})
    return facts


def answer(request):
    model = request["model"]
    if "job" in request:
        return trained(model, request["job"], half=request["half"])
    if "run" in request:
        return run_model(model, Path(request["run"]))
    if "changes" in request:
        return changed_layouts(request)
    world, size, spec = request["world"], request["size"], request["spec"]
    return [rank_facts(model, world, rank, size, spec) for rank in range(size)]


if __name__ == "__main__":
    for line in sys.stdin:
        answers = [answer(request) for request in json.loads(line)]
        sys.stdout.write("FACTS " + json.dumps(answers) + "\n")
        sys.stdout.flush()
