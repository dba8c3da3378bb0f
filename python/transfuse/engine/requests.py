"""What is asked of the engine, what it answers, and the state between."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transfuse.engine.sampling import uniforms
from transfuse.errors import InvalidArgumentError

_NO_TOKEN = -1


@dataclass(frozen=True)
class Request:
    """One sequence to continue."""

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # decides all draws: equal in any batch and for any number of ranks
    stop_token: int | None = None  # ends the sequence, as its last token


@dataclass(frozen=True)
class Completions:
    """Row i belongs to request i; what lies behind the end of a sequence is -1, or 0.0."""

    tokens: torch.Tensor  # int64 [requests, steps]: what was generated, with the stop token
    log_probabilities: torch.Tensor  # f32 [requests, steps], of the distribution drawn from
    versions: torch.Tensor  # int64 [requests, steps]: of the weights that each token came from
    counts: torch.Tensor  # int64 [requests]: how many tokens
    stopped: torch.Tensor  # bool [requests]: ended by its stop token

    def tokens_of(self, request: int) -> list[int]:
        """The generated tokens of one request."""
        tokens: list[int] = self.tokens[request, : int(self.counts[request])].tolist()
        return tokens


class Batch:
    """Sequences that are being generated, all of them in step; row i of the cache is row i here."""

    def __init__(self, requests: Sequence[Request]) -> None:
        prompts = [torch.tensor(request.prompt, dtype=torch.int64) for request in requests]
        new = torch.tensor([request.max_new_tokens for request in requests], dtype=torch.int64)
        self.step = 0
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])
        self._limits = self.lengths + new
        self.text = torch.zeros(len(requests), int(self._limits.max()), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            self.text[row, : len(prompt)] = prompt
        self.temperature = torch.tensor([r.temperature for r in requests], dtype=torch.float32)
        seeds = torch.tensor([_wrapped(request.seed) for request in requests])
        self._uniforms = uniforms(seeds, int(new.max()))
        stops = [_NO_TOKEN if r.stop_token is None else r.stop_token for r in requests]
        self._stops = torch.tensor(stops)
        self._requests = torch.arange(len(requests))  # by row
        shape = (len(requests), int(new.max()))
        self._tokens = torch.full(shape, _NO_TOKEN)
        self._log_probabilities = torch.zeros(shape)
        self._versions = torch.full(shape, _NO_TOKEN)
        self._stopped = torch.zeros(len(requests), dtype=torch.bool)

    @property
    def rows(self) -> int:
        """Sequences that have not ended."""
        return len(self.lengths)

    @property
    def uniform(self) -> torch.Tensor:
        """float64 [rows]: the chance of this step."""
        return self._uniforms[:, self.step]

    def append(
        self, tokens: torch.Tensor, log_probabilities: torch.Tensor, version: int
    ) -> torch.Tensor | None:
        """Ends a step. The rows that go on, if not all do: they are now rows 0, 1, ... in order."""
        self._tokens[self._requests, self.step] = tokens
        self._log_probabilities[self._requests, self.step] = log_probabilities
        self._versions[self._requests, self.step] = version
        stopped = tokens == self._stops
        self._stopped[self._requests] = stopped
        self.text[torch.arange(self.rows), self.lengths] = tokens
        self.lengths += 1
        self.step += 1
        going_on = (self.lengths < self._limits) & ~stopped
        if bool(going_on.all()):
            return None
        kept = going_on.nonzero().squeeze(1)
        self.lengths = self.lengths[kept]
        self.text = self.text[kept]
        self.temperature = self.temperature[kept]
        self._limits = self._limits[kept]
        self._stops = self._stops[kept]
        self._uniforms = self._uniforms[kept]
        self._requests = self._requests[kept]
        return kept

    def completions(self) -> Completions:
        """What there is so far, in memory of its own."""
        tokens = self._tokens[:, : self.step].clone()
        return Completions(
            tokens=tokens,
            log_probabilities=self._log_probabilities[:, : self.step].clone(),
            versions=self._versions[:, : self.step].clone(),
            counts=(tokens != _NO_TOKEN).sum(dim=1),
            stopped=self._stopped.clone(),
        )

    def checksum(self) -> int:
        """Equal on all ranks that have drawn the same."""
        return zlib.crc32(repr(self._tokens.tolist()).encode())


def check(requests: Sequence[Request], *, slots: int, max_tokens: int, vocab_size: int) -> None:
    """InvalidArgumentError naming the request and what is wrong with it."""
    if not 1 <= len(requests) <= slots:
        raise InvalidArgumentError(f"{len(requests)} requests: expected 1 to {slots} (slots)")
    for index, request in enumerate(requests):
        length = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1:
            wrong = f"{len(request.prompt)} tokens, {request.max_new_tokens} new: 1 needed of each"
        elif length > max_tokens:
            wrong = f"{length} tokens with the new ones: expected at most {max_tokens} (max_tokens)"
        elif min(request.prompt) < 0 or max(request.prompt) >= vocab_size:
            wrong = f"tokens from {min(request.prompt)} to {max(request.prompt)}: "
            wrong += f"the vocabulary has {vocab_size}"
        elif not (math.isfinite(request.temperature) and request.temperature >= 0):
            wrong = f"temperature {request.temperature}: expected a finite number, 0 or more"
        else:
            continue
        raise InvalidArgumentError(f"request {index}: {wrong}")


def checksum(requests: Sequence[Request]) -> int:
    """Equal for equal requests in every process."""
    text = repr(
        [(list(r.prompt), r.max_new_tokens, r.temperature, r.seed, r.stop_token) for r in requests]
    )
    return zlib.crc32(text.encode())


def _wrapped(seed: int) -> int:
    """A seed of any size as int64."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
