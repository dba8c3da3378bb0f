"""Which token comes next: greedy, or drawn at a temperature from a seed."""

from __future__ import annotations

import torch


def uniforms(seeds: torch.Tensor, count: int) -> torch.Tensor:
    """float64 [len(seeds), count] in [0, 1): number j of seed s depends on (s, j) alone.

    So a sequence draws the same whatever shares its batch and however many ranks compute it.
    SplitMix64 (Steele, Lea, Flood 2014), once over the seed and once over its counter.
    """
    counters = torch.arange(1, count + 1) * _GOLDEN
    bits = _mixed(_mixed(seeds * _GOLDEN + 1)[:, None] + counters)
    # 40 bits, not 53: u * total stays below the total when it is rounded.
    return _shifted(bits, 24).double() * 2.0**-40


def draw(
    logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token and its log-probability for every row.

    `logits` [rows, vocabulary] f32, `temperature` [rows] f32 (0: greedy), `uniform` [rows] float64.
    The log-probability is that of the distribution which the token was drawn from; for a greedy
    one, of the logits as they are. RuntimeError where logits are not numbers.
    """
    greedy = temperature == 0
    log_p = (logits / temperature.masked_fill(greedy, 1.0)[:, None]).log_softmax(dim=-1)
    tokens = logits.argmax(dim=-1, keepdim=True)  # a NaN counts as the largest
    if bool(log_p.gather(1, tokens).isnan().any()):
        raise RuntimeError("logits are not numbers: what do the weights hold?")
    if not bool(greedy.all()):
        cumulative = log_p.exp().cumsum(dim=-1, dtype=torch.float64)
        at = uniform[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, at, right=True)
        tokens = torch.where(greedy[:, None], tokens, drawn)
    return tokens.squeeze(1), log_p.gather(1, tokens).squeeze(1)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


_GOLDEN = _signed(0x9E3779B97F4A7C15)  # int64 arithmetic of torch wraps, as the constants want


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)
