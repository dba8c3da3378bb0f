"""Builds vLLM's own model class as every rank of a world would (groups are numbers here: nothing is
sent), runs its load_weights, and saves the parameters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
import vllm.platforms
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.distributed import parallel_state
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.torch_utils import set_default_torch_dtype

# Before anything asks which device there is; without a compiled part vLLM finds none.
vllm.platforms._current_platform = CpuPlatform()


def accept_any_backend():
    """Nothing computes the experts of gpt-oss on a CPU; their parameters are the same for all."""
    # This module asks for the platform when it is imported.
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as unquantized

    select = unquantized.select_unquantized_moe_backend

    def select_any(*args, **kwargs):
        try:
            return select(*args, **kwargs)
        except NotImplementedError:
            return unquantized.UnquantizedMoeBackend.TRITON, None

    unquantized.select_unquantized_moe_backend = select_any


def group(rank, size):
    return SimpleNamespace(
        rank_in_group=rank,
        world_size=size,
        rank=rank,
        ranks=list(range(size)),
        is_first_rank=rank == 0,
        is_last_rank=rank == size - 1,
        device_group=SimpleNamespace(size=lambda: size, rank=lambda: rank),
        cpu_group=None,
        device_communicator=None,
        unique_name="group",
    )


def without_kernels():
    """Quantised modules choose the kernels that will run them; nothing runs here."""
    from vllm.model_executor.layers.quantization import fp8

    fp8.init_fp8_linear_kernel = MagicMock()
    fp8.select_fp8_moe_backend = lambda *_, **__: (MagicMock(), MagicMock())


def build(folder, world, rank, dtype):
    tp, pp, dp = world.get("tp", 1), world.get("pp", 1), world.get("dp", 1)
    tp_rank, pp_rank, dp_rank = rank % tp, rank // tp % pp, rank // (tp * pp)
    parallel_state._TP = group(tp_rank, tp)
    parallel_state._PP = group(pp_rank, pp)
    parallel_state._DP = group(dp_rank, dp)
    parallel_state._PCP = group(0, 1)
    parallel_state._DCP = group(0, 1)
    parallel_state._EP = group(dp_rank * tp + tp_rank, dp * tp)
    parallel_state._WORLD = group(rank, tp * pp * dp)
    model_config = ModelConfig(
        model=str(folder),
        tokenizer_mode="auto",
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=True,
    )
    config = VllmConfig(model_config=model_config, load_config=LoadConfig())
    # Set afterwards: a configuration of several ranks would look for their devices.
    config.parallel_config.tensor_parallel_size = tp
    config.parallel_config.pipeline_parallel_size = pp
    config.parallel_config.data_parallel_size = dp
    config.parallel_config.data_parallel_rank = dp_rank
    config.parallel_config.enable_expert_parallel = world.get("ep", False)
    model_class, _ = ModelRegistry.resolve_model_cls(model_config.architectures, model_config)
    with set_current_vllm_config(config), set_default_torch_dtype(getattr(torch, dtype)):
        return model_class(vllm_config=config, prefix="")


def main():
    request = json.loads(sys.argv[1])
    accept_any_backend()
    folder = Path(request["folder"])
    weights = torch.load(folder / "weights.pt")
    dtype = request.get("dtype", "float32")
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        without_kernels()
    for rank in range(request["size"]):
        model = build(folder, request["world"], rank, dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            # Some loaders write into what they are given.
            model.load_weights((name, value.clone()) for name, value in weights.items())
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
