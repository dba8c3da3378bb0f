"""What the engine has answered, what it is worth, and what trainers are told of it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transfuse.demo.channel import ChildFailedError, Message
from transfuse.demo.rl.settings import TRAINERS, Settings
from transfuse.demo.rl.task import Tokens, advantages, make_prompts, rewards


@dataclass(frozen=True)
class Batch:
    """Prompts for the engine; sample j of prompt i is row i * samples + j."""

    name: str
    prompts: list[Tokens]
    samples: int
    temperature: float
    seed: int


def training_batch(settings: Settings, index: int) -> Batch:
    """What the engine is asked for step `index`: the same in every run with this seed."""
    prompts = make_prompts(f"{settings.seed}-{index}", settings.prompts, settings.digits)
    seed = settings.seed * 1_000_000 + index * 1000
    return Batch(f"rollout {index}", prompts, settings.samples, 1.0, seed)


def held_out_batch(settings: Settings) -> Batch:
    """Greedy answers to prompts that no step has asked for on purpose."""
    prompts = make_prompts(f"{settings.seed}-held-out", settings.held_out, settings.digits)
    return Batch("held-out prompts", prompts, 1, 0.0, 0)


@dataclass(frozen=True)
class Rollout:
    """Answers to one batch, all from the weights of one version."""

    batch: Batch
    version: int
    rank_versions: list[int]  # what each rank of the engine says
    tokens: list[Tokens]
    log_probabilities: list[list[float]]
    rewards: list[list[float]]

    @staticmethod
    def of(batch: Batch, answers: list[Message]) -> Rollout:
        """Of the answers of every rank; all of their tokens must be of one version."""
        versions = {a["version"] for a in answers}
        versions.update(version for a in answers for version in a["token_versions"])
        if len(versions) != 1:
            raise ChildFailedError(f"{batch.name} is of versions {sorted(versions)}: expected one")
        tokens = answers[0]["tokens"]
        worth = [rewards(batch.prompts[row // batch.samples], t) for row, t in enumerate(tokens)]
        return Rollout(
            batch,
            versions.pop(),
            [a["version"] for a in answers],
            tokens,
            answers[0]["log_probabilities"],
            worth,
        )

    @property
    def reward(self) -> float:
        """The mean over all tokens: the share of digits in their right places."""
        return fmean(fmean(row) for row in self.rewards)

    @property
    def solved(self) -> float:
        """The share of answers that are right as a whole."""
        return fmean(float(min(row)) for row in self.rewards)

    def share_of(self, trainer: int, shares: int = TRAINERS) -> dict[str, Any]:
        """The groups that one trainer learns from."""
        samples = self.batch.samples
        rows = len(self.tokens) // shares
        begin = trainer % shares * rows
        worth: list[list[float]] = []
        for group in range(begin, begin + rows, samples):
            worth += advantages(self.rewards[group : group + samples])
        mine = slice(begin, begin + rows)
        return {
            "version": self.version,
            "prompts": [self.batch.prompts[row // samples] for row in range(begin, begin + rows)],
            "tokens": self.tokens[mine],
            "log_probabilities": self.log_probabilities[mine],
            "advantages": worth,
        }
