"""The forward pass of one tensor parallel rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from transfuse.engine.cache import KvCache
from transfuse.engine.parallel import TensorParallel
from transfuse.engine.weights import Weights


@dataclass(frozen=True)
class _Layer:
    """The parameters of one decoder layer; the same memory that Weights holds."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden], of this rank
    q_norm: torch.Tensor  # [head_dim]
    k_norm: torch.Tensor  # [head_dim]
    attention_out: torch.Tensor  # [hidden, heads * head_dim]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    down: torch.Tensor  # [hidden, intermediate]


@dataclass(frozen=True)
class _Positions:
    """What all layers of one forward pass share."""

    index: torch.Tensor  # [rows, count]
    columns: int  # of the cache that are read
    mask: torch.Tensor  # [rows, 1, group * count, columns], added to the scores
    cos: torch.Tensor  # [rows, count, 1, head_dim]
    sin: torch.Tensor  # likewise, the first half negated


class Model:
    """Qwen3 on the weights as they are at each call; derives nothing that could be stale.

    Every rank calls it with the same arguments. Messages per call: one sum for the embedding, two
    for each layer, one gather for the logits. Used from one thread.
    """

    def __init__(self, weights: Weights, parallel: TensorParallel, max_tokens: int) -> None:
        config = weights.architecture.model
        self._parallel = parallel
        self._epsilon = weights.architecture.norm_epsilon
        self._head_dim = config.head_dim
        self._heads = config.num_attention_heads // parallel.size
        self.kv_heads = max(1, config.num_key_value_heads // parallel.size)
        self._vocab_size = config.vocab_size
        named = weights.parameters
        self._device = weights.device
        self._embedding = named["model.embed_tokens.weight"]
        self._first_token = parallel.rank * self._embedding.shape[0]
        self._head = named.get("lm_head.weight", self._embedding)
        self._norm = named["model.norm.weight"]
        self._layers = [_layer(named, index) for index in range(config.num_hidden_layers)]
        self._cos, self._sin = _rotations(weights, max_tokens)

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KvCache) -> torch.Tensor:
        """Runs `tokens` [rows, count] at `positions` of their sequences: [rows, count, hidden].

        Their keys and values go into the cache; those of all earlier positions must be there.
        """
        shared = self._shared(positions)
        x = self._embed(tokens.to(self._device))
        for index, layer in enumerate(self._layers):
            heads = self._attention(index, layer, self._normed(x, layer.input_norm), shared, cache)
            x = x + self._parallel.sum(F.linear(heads, layer.attention_out))
            gate, up = F.linear(self._normed(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            x = x + self._parallel.sum(F.linear(F.silu(gate) * up, layer.down))
        return self._normed(x, self._norm)

    def logits(self, hidden: torch.Tensor, note: bool = False) -> tuple[torch.Tensor, bool]:
        """[rows, vocabulary] in f32, without padding, on every rank; and the `note` of rank 0.

        In memory of the host, where tokens are drawn.
        """
        columns, note = self._parallel.gather_columns(F.linear(hidden, self._head), note)
        return columns[:, : self._vocab_size].float().cpu(), note

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._parallel.size == 1:
            return F.embedding(tokens, self._embedding)
        local = tokens - self._first_token
        elsewhere = (local < 0) | (local >= self._embedding.shape[0])
        x = F.embedding(local.masked_fill(elsewhere, 0), self._embedding)
        return self._parallel.sum(x.masked_fill_(elsewhere[..., None], 0))

    def _shared(self, positions: torch.Tensor) -> _Positions:
        rows, count = positions.shape
        columns = int(positions.max()) + 1
        positions = positions.to(self._device)
        every = torch.arange(columns, device=self._device)
        later = every > positions[:, None, :, None]  # [rows, 1, count, columns]
        mask = torch.zeros(later.shape, dtype=self._embedding.dtype, device=self._device)
        mask.masked_fill_(later, float("-inf"))
        group = self._heads // self.kv_heads
        mask = mask.expand(-1, group, -1, -1).reshape(rows, 1, group * count, columns)
        cos, sin = self._cos[positions][:, :, None], self._sin[positions][:, :, None]
        return _Positions(positions, columns, mask, cos, sin)

    def _attention(
        self, index: int, layer: _Layer, x: torch.Tensor, shared: _Positions, cache: KvCache
    ) -> torch.Tensor:
        rows, count, _ = x.shape
        heads, kv_heads, head_dim = self._heads, self.kv_heads, self._head_dim
        qkv = F.linear(x, layer.qkv).view(rows, count, heads + 2 * kv_heads, head_dim)
        norm = torch.cat(
            (layer.q_norm.expand(heads, head_dim), layer.k_norm.expand(kv_heads, head_dim))
        )
        qk = self._normed(qkv[:, :, : heads + kv_heads], norm)
        # cat(-right, left) * sin, with the sign in the table: `roll` swaps the halves.
        qk = qk * shared.cos + qk.roll(head_dim // 2, dims=-1) * shared.sin
        cache.write(index, shared.index, qk[:, :, heads:], qkv[:, :, heads + kv_heads :])
        keys, values = cache.read(index, rows, shared.columns)
        # The query heads of one KV head are further queries to it: no key is copied.
        queries = qk[:, :, :heads].view(rows, count, kv_heads, heads // kv_heads, head_dim)
        queries = queries.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, head_dim)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=shared.mask)
        out = out.view(rows, kv_heads, heads // kv_heads, count, head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(rows, count, heads * head_dim)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm of the last dimension, in f32; rounded before the weight, as in transformers."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._epsilon)
        return (wide * scale).to(x.dtype) * weight


def _layer(named: dict[str, torch.Tensor], index: int) -> _Layer:
    prefix = f"model.layers.{index}."
    return _Layer(
        input_norm=named[prefix + "input_layernorm.weight"],
        qkv=named[prefix + "self_attn.qkv_proj.weight"],
        q_norm=named[prefix + "self_attn.q_norm.weight"],
        k_norm=named[prefix + "self_attn.k_norm.weight"],
        attention_out=named[prefix + "self_attn.o_proj.weight"],
        mlp_norm=named[prefix + "post_attention_layernorm.weight"],
        gate_up=named[prefix + "mlp.gate_up_proj.weight"],
        down=named[prefix + "mlp.down_proj.weight"],
    )


def _rotations(weights: Weights, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin of every position: [max_tokens, head_dim] each, computed in f32."""
    head_dim = weights.architecture.model.head_dim
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / weights.architecture.rope_theta**exponents
    angles = torch.arange(max_tokens, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return cos.to(weights.device, weights.dtype), sin.to(weights.device, weights.dtype)
