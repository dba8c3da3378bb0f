"""The task: answer four digits with the same digits in ascending order. Anyone can check it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean, pstdev

BASE = 10
ASK = BASE  # the token that ends a prompt
# Keeps groups whose samples nearly agree from being blown up to the scale of those that do not.
_LEAST_DEVIATION = 0.1

Tokens = list[int]


def make_prompts(seed: str, count: int, digits: int) -> list[Tokens]:
    """Random digits and the sign that asks for them in order; equal for equal seeds."""
    chance = random.Random(seed)  # noqa: S311
    return [[chance.randrange(BASE) for _ in range(digits)] + [ASK] for _ in range(count)]


def rewards(prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """1 for every token that is right in its place, else 0."""
    expected = sorted(prompt[:-1])
    return [float(a == b) for a, b in zip(answer, expected, strict=True)]


def advantages(group: Sequence[Sequence[float]]) -> list[list[float]]:
    """Of every token of every sample: its reward over the mean of the group at this place.

    Divided by their standard deviation there. The samples answer one prompt.
    """
    by_place = [_relative(place) for place in zip(*group, strict=True)]
    return [list(sample) for sample in zip(*by_place, strict=True)]


def _relative(values: Sequence[float]) -> list[float]:
    mean, deviation = fmean(values), pstdev(values)
    return [(value - mean) / (deviation + _LEAST_DEVIATION) for value in values]
