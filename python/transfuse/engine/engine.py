"""Batched generation with a safe point between steps, where new weights may come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from transfuse.engine.cache import KvCache
from transfuse.engine.model import Model
from transfuse.engine.parallel import TensorParallel
from transfuse.engine.requests import Batch, Completions, Request, check, checksum
from transfuse.engine.sampling import draw
from transfuse.engine.weights import Weights
from transfuse.errors import InvalidArgumentError

_NO_VERSION = 0
_FAILED = -1


class MixedVersionsError(RuntimeError):
    """The ranks do not hold one and the same version; the engine does not serve until they do."""


class SafePoint(Protocol):
    """What the engine asks between two steps, when no rank computes."""

    def due(self) -> bool:
        """True if a commit is wanted now. Asked on rank 0 alone, at every step; must not wait."""
        ...

    def commit(self) -> int:
        """Called on every rank at the same safe point, if due: the only time when weights change.

        Returns the version that the parameters hold now, whether it changed or not; 0 if none.
        """
        ...


class Engine:
    """Generates on all ranks of a tensor parallel group in step.

    Every rank makes the same calls with the same arguments and gets the same results. A sequence
    that runs while weights change goes on with them: its cache is computed again, so each token is
    drawn as if all before it had been its prompt, and Completions says which version drew it. After
    a failed call the next one starts afresh; after the death of a rank make a new group and a new
    Engine on the same Weights. Used from one thread.
    """

    def __init__(
        self,
        weights: Weights,
        parallel: TensorParallel | None = None,
        *,
        slots: int = 128,
        max_tokens: int = 512,
        version: int = _NO_VERSION,
    ) -> None:
        """Up to `slots` sequences at once of up to `max_tokens` tokens each, prompt included.

        `version` is what the weights hold already; 0 if it has no number.
        """
        parallel = parallel or TensorParallel()
        if (weights.rank, weights.size) != (parallel.rank, parallel.size):
            message = f"weights of rank {weights.rank} of {weights.size}, "
            message += f"but this is rank {parallel.rank} of {parallel.size} in the group"
            raise InvalidArgumentError(message)
        self.safe_point: SafePoint | None = None
        self._version = version
        self._refused = ""
        self._parallel = parallel
        self._model = Model(weights, parallel, max_tokens)
        config = weights.architecture.model
        self._vocab_size = config.vocab_size
        self._cache = KvCache(
            layers=config.num_hidden_layers,
            rows=slots,
            columns=max_tokens,
            heads=self._model.kv_heads,
            head_dim=config.head_dim,
            dtype=weights.dtype,
            device=weights.device,
        )

    @property
    def version(self) -> int:
        """The version that the next token comes from; 0 if it has no number."""
        return self._version

    def generate(
        self, requests: Sequence[Request], *, commit_between_steps: bool = True
    ) -> Completions:
        """Continues all requests until each has stopped or is as long as it may be.

        The first safe point is before the first step; without `commit_between_steps` it is the only
        one, and all tokens come from one version.
        """
        limits = {"slots": self._cache.rows, "max_tokens": self._cache.columns}
        check(requests, vocab_size=self._vocab_size, **limits)
        self._begin(checksum(requests))
        batch = Batch(requests)
        stale, due = True, False
        while batch.rows > 0:
            if due:
                stale |= self._commit()
            due = self._step(batch, stale=stale, ask=commit_between_steps)
            stale = False
        self._end(batch)
        return batch.completions()

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """f32 [sequences, length, vocabulary], without padding, of int64 [sequences, length].

        A safe point comes before. As many sequences and as long ones as generate() takes.
        """
        if tokens.dim() != 2 or not (
            0 < tokens.shape[0] <= self._cache.rows and 0 < tokens.shape[1] <= self._cache.columns
        ):
            limits = f"1 to {self._cache.rows} sequences of 1 to {self._cache.columns} tokens"
            raise InvalidArgumentError(f"tokens of shape {list(tokens.shape)}: expected {limits}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._vocab_size:
            raise InvalidArgumentError(f"tokens outside the vocabulary of {self._vocab_size}")
        self._begin(checksum([Request(row, 0) for row in tokens.tolist()]))
        with torch.inference_mode():
            positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
            hidden = self._model.hidden(tokens, positions, self._cache)
            logits, _ = self._model.logits(hidden.flatten(0, 1))
        return logits.view(*tokens.shape, -1).clone()  # no inference tensor outside

    def _begin(self, call: int) -> None:
        """The first safe point of a call; all ranks make the same one and hold the same version."""
        said = self._parallel.gather_numbers(call, int(self._ask()), self._version)
        if any(rank[0] != call for rank in said):
            raise InvalidArgumentError("the ranks of the engine were called with other arguments")
        if said[0][1]:
            self._commit()
        elif any(rank[2] != self._version for rank in said):
            self._refused = f"versions of the ranks: {[rank[2] for rank in said]}"
        if self._refused:
            raise MixedVersionsError(self._refused)

    def _ask(self) -> bool:
        return self._parallel.rank == 0 and self.safe_point is not None and self.safe_point.due()

    def _commit(self) -> bool:
        """True if the weights changed."""
        if self.safe_point is None:
            self._parallel.gather_numbers(_FAILED)
            raise InvalidArgumentError("rank 0 commits, and this rank has no safe_point")
        self._refused = "a commit was begun and did not end"
        try:
            version = self.safe_point.commit()
        except Exception:
            self._parallel.gather_numbers(_FAILED)
            raise
        versions = [rank[0] for rank in self._parallel.gather_numbers(version)]
        if any(v != version or v <= _NO_VERSION for v in versions):
            self._refused = f"versions of the ranks after a commit: {versions} "
            self._refused += f"({_NO_VERSION}: none, {_FAILED}: its commit failed)"
            raise MixedVersionsError(self._refused)
        changed = version != self._version
        self._version, self._refused = version, ""
        return changed

    @torch.inference_mode()
    def _step(self, batch: Batch, *, stale: bool, ask: bool) -> bool:
        """One token for every running sequence. True if a commit is due before the next."""
        rows, last = torch.arange(batch.rows), batch.lengths - 1
        if stale:
            self._cache.clear(*batch.text.shape)
            count = int(batch.lengths.max())
            positions = torch.arange(count).expand(batch.rows, count)
            hidden = self._model.hidden(batch.text[:, :count], positions, self._cache)
            hidden = hidden[rows, last]
        else:
            tokens = batch.text[rows, last]
            hidden = self._model.hidden(tokens[:, None], last[:, None], self._cache)[:, 0]
        logits, due = self._model.logits(hidden, ask and self._ask())
        tokens, log_probabilities = draw(logits, batch.temperature, batch.uniform)
        columns = int(last.max()) + 1
        kept = batch.append(tokens, log_probabilities, self._version)
        if kept is not None:
            self._cache.keep(kept, columns)
        return due

    def _end(self, batch: Batch) -> None:
        """Every rank has drawn the same: they compute alike, but this is not left to belief."""
        drawn = batch.checksum()
        if any(rank[0] != drawn for rank in self._parallel.gather_numbers(drawn)):
            raise RuntimeError("the ranks of the engine have drawn different tokens")
