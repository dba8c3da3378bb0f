"""What all processes of one reinforcement learning run agree on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

MODEL = "policy"
GROUP = "engine0"
TRAINERS = 2
RANKS = 2  # of the engine
FSDP = "fsdp:dp=2"  # what the trainers are where nobody says otherwise
TRAINER_NAMES = tuple(f"trainer{rank}" for rank in range(TRAINERS))
RANK_NAMES = tuple(f"{GROUP}.tp{rank}" for rank in range(RANKS))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the model, the task and the run, and where its files lie."""

    job: str
    folder: str  # of this run, removed at its end: rendezvous, logs, layouts
    trainer: str = FSDP
    device: str = "cpu"  # where models lie; or "cuda"
    engine: str = "formula"  # where the layout of the engine comes from; or "captured"
    refits: bool = True  # False: the control run, whose engine keeps the version it began with
    steps: int = 200
    kill_at: int = 100  # a rank of the engine, in the rollout that runs beside this step
    stop_at: int = 140  # a trainer, before it publishes what this step has made
    stop_s: float = 3.0
    seed: int = 1
    digits: int = 4  # of a prompt
    prompts: int = 32  # of a rollout; each trainer gets an equal share
    samples: int = 8  # for each prompt: the group whose mean an advantage is relative to
    held_out: int = 256  # prompts of the evaluation
    max_lag: int = 2  # versions by which a rollout may be older than the weights it trains
    clip: float = 0.2  # of the importance ratio
    learning_rate: float = 1e-3  # at the first step; a fifth of it at the last
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    intermediate: int = 384
    # How much better than the control run it must end; None: too short to judge.
    margin: float | None = 0.3  # in the reward of the last rollouts
    trained_margin: float = 0.15  # on held-out prompts, with the weights that were trained
    deadline_s: float = 60.0  # of every single wait

    def to_json(self) -> str:
        """For the command line of a process."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        """The inverse of to_json()."""
        return Settings(**json.loads(text))

    @property
    def shares(self) -> int:
        """Parts of a rollout that are learned from apart; tensor parallel trainers share one."""
        return TRAINERS if self.trainer == FSDP else 1

    @property
    def path(self) -> Path:
        """The folder of this run."""
        return Path(self.folder)

    def model_config(self) -> dict[str, Any]:
        """The architecture, as a config.json says it."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": 16,  # ten digits and the sign that ends a prompt; even, to be sharded
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.hidden // self.heads,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        }


def tiny(settings: Settings) -> Settings:
    """A run of seconds, for tests: same processes and failures, too few steps to learn."""
    return dataclasses.replace(
        settings,
        stop_s=1.0,
        prompts=4,
        samples=4,
        held_out=8,
        hidden=64,
        intermediate=96,
        margin=None,
    )


def with_steps(settings: Settings, steps: int) -> Settings:
    """A run of another length; what happens to its processes happens at the same share of it."""
    return dataclasses.replace(
        settings,
        steps=steps,
        kill_at=max(1, steps // 2),
        stop_at=max(steps // 2 + 1, steps * 7 // 10),
    )
