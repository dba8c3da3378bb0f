#!/usr/bin/env python3
"""Measures transfuse.capture() on Qwen3-30B-A3B: 18,867 tensors, by a loader as vLLM's.

    PYTHONPATH=build/dev/python bench/capture.py [--layers 48] [--repetitions 5] [--json FILE]

Names, shapes and counts are those of the model; tensors and parameters have no memory, so it needs
none. For every spec all tensors go through the loader; what a rank does not hold, it does not copy.
The captured layout must equal that of the formula, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import transfuse

SPECS = ("vllm:tp=1", "vllm:tp=2", "vllm:tp=4,ep")
Weights = Iterable[tuple[str, torch.Tensor]]


def config_of(layers: int) -> dict[str, object]:
    """Qwen3-30B-A3B, perhaps with fewer layers."""
    return {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_experts": 128,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


class MoeRank:
    """The parameters of one rank on the meta device, and a loader in the manner of engines."""

    def __init__(self, config: transfuse.ModelConfig, rank: int, size: int, *, ep: bool) -> None:
        self._rank, self._size = rank, size
        self._heads = config.num_attention_heads * config.head_dim // size
        self._kv = max(1, config.num_key_value_heads // size) * config.head_dim
        self._first_expert = rank * config.num_experts // size if ep else 0
        self._ep = ep
        hidden, layers = config.hidden_size, range(config.num_hidden_layers)
        experts = config.num_experts // size if ep else config.num_experts
        inner = config.moe_intermediate_size if ep else config.moe_intermediate_size // size
        vocabulary = math.ceil(config.vocab_size / 64) * 64 // size
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.qkv_proj.weight": (self._heads + 2 * self._kv, hidden),
            "self_attn.q_norm.weight": (config.head_dim,),
            "self_attn.k_norm.weight": (config.head_dim,),
            "self_attn.o_proj.weight": (hidden, self._heads),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate.weight": (config.num_experts, hidden),
            "mlp.experts.routed_experts.w13_weight": (experts, 2 * inner, hidden),
            "mlp.experts.routed_experts.w2_weight": (experts, hidden, inner),
        }
        shapes = {f"model.layers.{n}.{name}": s for n in layers for name, s in shapes.items()}
        shapes |= {n: (vocabulary, hidden) for n in ("model.embed_tokens.weight", "lm_head.weight")}
        shapes["model.norm.weight"] = (hidden,)
        self.parameters = {
            name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for name, shape in shapes.items()
        }

    def load_weights(self, weights: Weights) -> None:
        """What an engine calls with the tensors of a checkpoint."""
        for name, tensor in weights:
            if ".experts." in name:
                self._expert(name, tensor)
            elif name.rpartition("_proj")[0][-1:] in ("q", "k", "v"):
                self._attention(name, tensor)
            elif name.endswith("o_proj.weight"):
                self._columns(self.parameters[name], tensor)
            elif name.startswith(("lm_head", "model.embed")):
                place = self.parameters[name]
                rows = tensor[self._rank * len(place) :][: len(place)]
                place[: len(rows)].data.copy_(rows)
                place[len(rows) :].data.fill_(0)
            else:
                self.parameters[name].data.copy_(tensor)

    def _columns(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        columns = place.shape[-1]
        begin = 0 if columns == tensor.shape[1] else self._rank * columns
        place.data.copy_(tensor.narrow(1, begin, columns))

    def _attention(self, name: str, tensor: torch.Tensor) -> None:
        kind = name.rpartition("_proj")[0][-1]
        place = self.parameters[name.replace(f"{kind}_proj", "qkv_proj")]
        at = {"q": 0, "k": self._heads, "v": self._heads + self._kv}[kind]
        rows = self._heads if kind == "q" else self._kv
        begin = self._rank * tensor.shape[0] // self._size
        place.data.narrow(0, at, rows).copy_(tensor.narrow(0, begin, rows))

    def _expert(self, name: str, tensor: torch.Tensor) -> None:
        module, _, rest = name.partition(".experts.")
        number, kind, _ = rest.split(".")
        w13 = self.parameters[f"{module}.experts.routed_experts.w13_weight"]
        expert = int(number) - self._first_expert
        if not 0 <= expert < len(w13):
            return
        if kind == "down_proj":
            stack = self.parameters[f"{module}.experts.routed_experts.w2_weight"]
            self._columns(stack.data[expert], tensor)
            return
        rows = w13.shape[1] // 2
        begin = 0 if self._ep else self._rank * rows
        half = w13.data[expert].narrow(0, rows if kind == "up_proj" else 0, rows)
        half.copy_(tensor.narrow(0, begin, rows))


def measure(spec_text: str, layers: int, repetitions: int) -> dict[str, object]:
    """One row; SystemExit if the layout is not that of the formula."""
    config = transfuse.parse_model_config(json.dumps(config_of(layers)))
    spec = transfuse.parse_parallel_spec(spec_text)
    rank = MoeRank(config, spec.rank_count - 1, spec.rank_count, ep=spec_text.endswith(",ep"))
    seconds, cpu_seconds = [], []
    for _ in range(repetitions):
        start, cpu_start = time.perf_counter(), time.process_time()
        captured = transfuse.capture(rank.load_weights, rank.parameters, config)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    formula = transfuse.make_layout(config, spec, spec.rank_count - 1)
    if captured.layout.digest != formula.digest:
        raise SystemExit(f"{spec_text}: the captured layout is not that of the formula")
    row: dict[str, object] = {
        "spec": spec_text,
        "tensors": len(captured.report.tensors),
        "used": captured.report.counts["direct"],
        "tiles": captured.report.tile_count,
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
    }
    sys.stdout.write(
        f"{spec_text:>14}  {row['tensors']:>6} tensors, {row['used']:>6} used, "
        f"{row['tiles']:>6} tiles: {statistics.median(seconds):.2f} s, of a core "
        f"{statistics.median(cpu_seconds):.2f} s (medians of {repetitions})\n"
    )
    sys.stdout.flush()
    return row


def main() -> None:
    """Measures and prints a line for each spec."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    rows = [measure(spec, arguments.layers, arguments.repetitions) for spec in SPECS]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
