"""Checkpoints on disk: `transfuse convert` against torch and the safetensors package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

COMMAND = shutil.which("transfuse")

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 103,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The published tensors of CONFIG, all different."""
    torch.manual_seed(7)
    h, i, d = 32, 48, 8
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (103, h),
        "model.norm.weight": (h,),
        "lm_head.weight": (103, h),
    }
    for layer in range(2):
        p = f"model.layers.{layer}."
        shapes |= {
            p + "input_layernorm.weight": (h,),
            p + "post_attention_layernorm.weight": (h,),
            p + "self_attn.q_proj.weight": (8 * d, h),
            p + "self_attn.k_proj.weight": (2 * d, h),
            p + "self_attn.v_proj.weight": (2 * d, h),
            p + "self_attn.o_proj.weight": (h, 8 * d),
            p + "self_attn.q_norm.weight": (d,),
            p + "self_attn.k_norm.weight": (d,),
            p + "mlp.gate_proj.weight": (i, h),
            p + "mlp.up_proj.weight": (i, h),
            p + "mlp.down_proj.weight": (h, i),
        }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a checkpoint `m` that the safetensors package wrote."""
    assert COMMAND, "transfuse is not on the PATH"
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    return tmp_path


def convert(folder: Path, source: tuple[str, str], target: tuple[str, str], *more: str) -> None:
    """Converts (spec, name) into (spec, name)."""
    assert COMMAND
    config = folder / "m/config.json"
    subprocess.run(
        [COMMAND, "convert", "--config", config, "--from", source[0], folder / source[1]]
        + ["--to", target[0], folder / target[1], "--verify", *more],
        check=True,
        capture_output=True,
        text=True,
    )


def vllm_rank(full: dict[str, torch.Tensor], rank: int, tp: int) -> dict[str, torch.Tensor]:
    """What vLLM's parallel linear layers hold, by torch alone."""

    def rows(name: str) -> torch.Tensor:
        return full[name].chunk(tp, dim=0)[rank]

    def heads(name: str, count: int) -> torch.Tensor:
        per_head = full[name].unflatten(0, (count, -1))
        if count >= tp:
            return per_head.chunk(tp)[rank].flatten(0, 1)
        return per_head[rank // (tp // count)]

    def vocabulary(name: str) -> torch.Tensor:
        return torch.nn.functional.pad(full[name], (0, 0, 0, 128 - 103)).chunk(tp)[rank]

    held = {
        "model.embed_tokens.weight": vocabulary("model.embed_tokens.weight"),
        "lm_head.weight": vocabulary("lm_head.weight"),
        "model.norm.weight": full["model.norm.weight"],
    }
    for layer in range(2):
        p = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm"):
            held[p + norm + ".weight"] = full[p + norm + ".weight"]
        held[p + "self_attn.k_norm.weight"] = full[p + "self_attn.k_norm.weight"]
        attention = p + "self_attn."
        held[attention + "qkv_proj.weight"] = torch.cat(
            [
                heads(attention + "q_proj.weight", 8),
                heads(attention + "k_proj.weight", 2),
                heads(attention + "v_proj.weight", 2),
            ]
        )
        held[attention + "o_proj.weight"] = full[attention + "o_proj.weight"].chunk(tp, 1)[rank]
        held[p + "mlp.gate_up_proj.weight"] = torch.cat(
            [rows(p + "mlp.gate_proj.weight"), rows(p + "mlp.up_proj.weight")]
        )
        held[p + "mlp.down_proj.weight"] = full[p + "mlp.down_proj.weight"].chunk(tp, 1)[rank]
    return held


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and every bit."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert (
            found[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))
        ), name


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_files_of_vllm_ranks_hold_what_torch_cuts(folder: Path, tp: int) -> None:
    convert(folder, ("hf", "m"), (f"vllm:tp={tp}", "out"))
    for rank in range(tp):
        found = load_file(folder / f"out/rank{rank}.safetensors")
        assert_same(found, vllm_rank(tensors(), rank, tp))


@pytest.mark.parametrize("dp", [1, 3, 40])
def test_files_of_fsdp_ranks_hold_what_torch_chunks(folder: Path, dp: int) -> None:
    convert(folder, ("hf", "m"), (f"fsdp:dp={dp}", "out"))
    for rank in range(dp):
        expected = {}
        for name, tensor in tensors().items():
            chunks = tensor.chunk(dp)
            expected[name] = chunks[rank] if rank < len(chunks) else tensor[:0]
        assert_same(load_file(folder / f"out/rank{rank}.safetensors"), expected)


def test_a_chain_of_conversions_ends_with_the_identical_file(folder: Path) -> None:
    convert(folder, ("hf", "m"), ("fsdp:dp=3", "a"))
    convert(folder, ("fsdp:dp=3", "a"), ("vllm:tp=2", "b"))
    convert(folder, ("vllm:tp=2", "b"), ("hf", "c"))
    for name in ("model.safetensors", "config.json"):
        assert (folder / "c" / name).read_bytes() == (folder / "m" / name).read_bytes()


def test_casts_are_those_of_torch(folder: Path) -> None:
    save_file(tensors(torch.float32), folder / "m/model.safetensors")
    convert(folder, ("hf:dtype=f32", "m"), ("fsdp:dp=2,dtype=f32", "wide"))
    convert(folder, ("fsdp:dp=2,dtype=f32", "wide"), ("hf", "narrow"))
    assert_same(load_file(folder / "narrow/model.safetensors"), tensors())


def test_shards_are_found_through_their_index_by_name(folder: Path) -> None:
    convert(folder, ("hf", "m"), ("hf", "shards"), "--shard-gb", "0.00002")
    index = json.loads((folder / "shards/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= load_file(folder / "shards" / file)
    assert_same(found, tensors())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    convert(folder, ("hf", "shards"), ("hf", "whole"))
    original = (folder / "m/model.safetensors").read_bytes()
    assert (folder / "whole/model.safetensors").read_bytes() == original


def test_transformers_loads_what_was_converted_back(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    convert(folder, ("hf", "m"), ("vllm:tp=4", "ranks"))
    convert(folder, ("vllm:tp=4", "ranks"), ("hf", "back"), "--shard-gb", "0.00002")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "back", dtype="auto")
    assert_same(dict(model.state_dict()), tensors())


# A small process between: what a child inherits of this one's memory would count as its own.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.parametrize(
    ("source", "target"), [("hf", "hf"), ("hf:dtype=f32", "vllm:tp=2,dtype=bf16")]
)
def test_memory_of_a_conversion_does_not_grow_with_the_model(
    tmp_path: Path, source: str, target: str
) -> None:
    assert COMMAND
    wide = "dtype=f32" in source
    peaks = []
    for vocabulary in (1 << 14, 1 << 18):  # 16 and 256 MiB a tensor of bf16
        config = CONFIG | {"vocab_size": vocabulary, "hidden_size": 512}
        folder = tmp_path / str(vocabulary)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        listed = subprocess.run(
            [COMMAND, "inspect", "hf", "--config", folder / "config.json", "--json"],
            check=True,
            stdout=subprocess.PIPE,
        )
        header, at = {}, 0
        for tensor in json.loads(listed.stdout)["tensors"]:
            end = at + tensor["size_bytes"] * (2 if wide else 1)
            dtype = "F32" if wide else "BF16"
            offsets = [at, end]
            header[tensor["name"]] = {
                "dtype": dtype,
                "shape": tensor["shape"],
                "data_offsets": offsets,
            }
            at = end
        text = json.dumps(header).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)  # zeros that take no room
        measured = subprocess.run(
            [sys.executable, "-S", "-c", PEAK, COMMAND, "convert", "--from", source, folder]
            + ["--to", target, tmp_path / "out"],
            check=True,
            stdout=subprocess.PIPE,
        )
        peaks.append(int(measured.stdout) * 1024)
        shutil.rmtree(tmp_path / "out")
    assert peaks[1] - peaks[0] < 32 << 20, peaks
    assert peaks[1] < 64 << 20, peaks
