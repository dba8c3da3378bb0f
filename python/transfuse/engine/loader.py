"""How the engine itself loads a checkpoint: every rank takes its share of whole tensors.

Written as engines write it, from the shapes of the model alone: it knows nothing of layouts, which
transfuse.capture() learns from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from transfuse._transfuse import ModelConfig
from transfuse.errors import InvalidArgumentError

_VOCABULARY_MULTIPLE = 64


def parameter_shapes(config: ModelConfig, size: int) -> dict[str, tuple[int, ...]]:
    """The parameters of one of `size` ranks, fused, cut and padded as vLLM has them."""
    hidden, head = config.hidden_size, config.head_dim
    heads = config.num_attention_heads // size
    kv_heads = max(1, config.num_key_value_heads // size)
    inner = config.intermediate_size // size
    vocabulary = -(-config.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE // size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config.num_hidden_layers):
        for name, shape in {
            "input_layernorm": (hidden,),
            "self_attn.qkv_proj": ((heads + 2 * kv_heads) * head, hidden),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "self_attn.o_proj": (hidden, heads * head),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_up_proj": (2 * inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


class Loader:
    """Loads checkpoint tensors, one after the other in any order, into the parameters of a rank."""

    def __init__(
        self, config: ModelConfig, parameters: Mapping[str, torch.Tensor], rank: int, size: int
    ) -> None:
        self._parameters = parameters
        self._rank = rank
        self._size = size
        head = config.head_dim
        heads, kv_heads = config.num_attention_heads // size, config.num_key_value_heads
        inner = config.intermediate_size // size
        # With fewer heads of keys and values than ranks, neighbouring ranks hold the same one.
        kv_rows = max(1, kv_heads // size) * head
        kv_begin = rank * kv_heads // size * head
        query_rows = heads * head
        # By the end of a checkpoint name: where it goes, its first row there and in the whole.
        self._fused = {
            "q_proj": ("qkv_proj", 0, rank * query_rows, query_rows),
            "k_proj": ("qkv_proj", query_rows, kv_begin, kv_rows),
            "v_proj": ("qkv_proj", query_rows + kv_rows, kv_begin, kv_rows),
            "gate_proj": ("gate_up_proj", 0, rank * inner, inner),
            "up_proj": ("gate_up_proj", inner, rank * inner, inner),
        }

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """What an engine calls with the tensors of a checkpoint."""
        for name, whole in weights:
            self._load(name, whole)

    def _load(self, name: str, whole: torch.Tensor) -> None:
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in self._fused:
            fused, at, begin, rows = self._fused[kind]
            place = self._parameter(f"{module}.{fused}.weight", name)
            place.narrow(0, at, rows).copy_(whole.narrow(0, begin, rows))
            return
        place = self._parameter(name, name)
        if kind in ("o_proj", "down_proj"):
            columns = place.shape[1]
            place.copy_(whole.narrow(1, self._rank * columns, columns))
        elif kind in ("embed_tokens", "lm_head"):
            begin = min(self._rank * place.shape[0], whole.shape[0])
            rows = min(place.shape[0], whole.shape[0] - begin)
            place[:rows].copy_(whole.narrow(0, begin, rows))
            place[rows:].zero_()
        else:
            place.copy_(whole)

    def _parameter(self, name: str, wanted_for: str) -> torch.Tensor:
        if name not in self._parameters:
            message = f"{wanted_for}: this engine has no parameter {name}"
            raise InvalidArgumentError(f"{message} (expected a tensor of a Qwen3 checkpoint)")
        return self._parameters[name]
