"""Builds SGLang's own model class as every rank of a world would (groups are numbers here: nothing
is sent), runs its load_weights, and saves the parameters. Packages for devices, which SGLang
imports and none of this uses, are stood in for where they are not installed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

# What is imported at the top of SGLang's modules and only used to run or to serve a model.
FOR_DEVICES = (
    "IPython av cutlass dill flashinfer interegular loguru nvtx outlines pynvml quack sgl_kernel "
    "torchao torchvision triton triton_kernels xgrammar"
).split()


class NamesAtWill(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class Nothing(metaclass=NamesAtWill):
    """Stands for any class, function or constant."""

    def __init__(self, *args: Any, **options: Any) -> None: ...
    def __call__(self, *args: Any, **options: Any) -> Any:
        return args[0] if args and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing

    def __class_getitem__(cls, item: Any) -> Any:
        return cls


class AbsentModule(types.ModuleType):
    __version__ = "9.9.9"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "dumps":
            return lambda value: b""
        if name in ("jit", "autotune", "heuristics"):
            return lambda *a, **o: a[0] if a and callable(a[0]) else lambda f: f
        return Nothing


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on the path: only for what is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in FOR_DEVICES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return AbsentModule(spec.name)

    def exec_module(self, module): ...


sys.meta_path.append(StandIns())

from sglang.srt.eplb import expert_location  # noqa: E402
from sglang.srt.layers.dp_attention import initialize_dp_attention  # noqa: E402
from sglang.srt.runtime_context import (  # noqa: E402
    SpawnRanks,
    get_parallel,
    publish,
    reset_context,
)
from sglang.srt.server_args import ServerArgs  # noqa: E402
from transformers import AutoConfig  # noqa: E402

CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
    "gemma3_text": ("gemma3_causal", "Gemma3ForCausalLM"),
    "glm4_moe": ("glm4_moe", "Glm4MoeForCausalLM"),
    "deepseek_v3": ("deepseek_v2", "DeepseekV3ForCausalLM"),
}


def group(rank, size):
    return SimpleNamespace(
        rank_in_group=rank,
        world_size=size,
        is_first_rank=rank == 0,
        is_last_rank=rank == size - 1,
        device_group=None,
        cpu_group=None,
    )


def build(model_class, config, folder, world, rank):
    """The model as `rank` has it."""
    reset_context()
    args = ServerArgs(
        model_path=str(folder),
        device="cpu",
        skip_tokenizer_init=True,
        dtype="float32",
        tp_size=world.get("tp", 1),
        pp_size=world.get("pp", 1),
        ep_size=world.get("ep", 1),
        attn_dp_size=world.get("dp", 1),
        enable_dp_lm_head=world.get("lm_head") == "attention",
        ep_num_redundant_experts=world.get("redundant", 0),
        disable_shared_experts_fusion=True,
    )
    publish(args, role="test", ranks=SpawnRanks(world_rank=rank))
    initialize_dp_attention(args)
    parallel = get_parallel()
    names = ("tp", "pp", "attn_tp", "attn_cp", "moe_ep", "moe_tp")
    ranks = {n: (getattr(parallel, f"{n}_rank"), getattr(parallel, f"{n}_size")) for n in names}
    parallel.override_permanently(**{f"{n}_group": group(*at) for n, at in ranks.items()})
    if hasattr(model_class, "get_model_config_for_expert_location"):
        place_experts(model_class, config, ranks["moe_ep"][0], world.get("expert_map"))
    return model_class(config)


def place_experts(model_class, config, ep_rank, expert_map):
    location = expert_location.ExpertLocationMetadata
    expert_location.ModelConfigForExpertLocation.from_model_config = staticmethod(
        lambda _: model_class.get_model_config_for_expert_location(config)
    )
    if expert_map is None:
        metadata = location.init_trivial(None, ep_rank)
    else:
        metadata = location.init_by_mapping(None, expert_map, ep_rank)
    expert_location.set_global_expert_location_metadata(metadata)


def main():
    request = json.loads(sys.argv[1])
    folder = Path(request["folder"])
    weights = torch.load(folder / "weights.pt")
    config = AutoConfig.from_pretrained(folder)
    module, name = CLASSES[config.model_type]
    model_class = getattr(importlib.import_module(f"sglang.srt.models.{module}"), name)
    if hasattr(sys.modules[model_class.__module__], "get_rope_wrapper"):
        # Without weights, and on a CPU made for published models' settings only.
        sys.modules[model_class.__module__].get_rope_wrapper = lambda *a, **o: torch.nn.Identity()
    torch.set_default_dtype(torch.float32)
    for rank in range(request["size"]):
        model = build(model_class, config, folder, request["world"], rank)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.load_weights(iter(weights.items()))
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
