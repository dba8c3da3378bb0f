"""What all processes of one demo agree on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers

MODEL = "demo"
TRAINERS = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the model and the run, and where its files lie."""

    job: str
    folder: str  # of this run, removed at its end: rendezvous, logs, layouts, logits
    text: str = ""  # path of other text than the GPL
    device: str = "cpu"  # where models lie; or "cuda"
    steps: int = 120
    sample_every: int = 15
    sample_tokens: int = 48
    seed: int = 1
    batch: int = 10  # sequences per trainer and step
    context: int = 64
    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 3
    heads: int = 8
    key_value_heads: int = 2
    head_dim: int = 32
    intermediate: int = 704
    learning_rate: float = 2e-3
    deadline_s: float = 60.0  # of every single wait

    def to_json(self) -> str:
        """For the command line of a process."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        """The inverse of to_json()."""
        return Settings(**json.loads(text))

    @property
    def path(self) -> Path:
        """The folder of this run."""
        return Path(self.folder)

    def model_config(self) -> transformers.Qwen3Config:
        """The architecture, as transformers describes it."""
        import transformers

        return transformers.Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            use_cache=True,
        )


def tiny(settings: Settings) -> Settings:
    """A run of seconds, for tests: same processes and phases, smaller numbers."""
    return dataclasses.replace(
        settings,
        steps=8,
        sample_every=4,
        sample_tokens=8,
        batch=2,
        context=32,
        vocabulary=512,
        hidden=64,
        layers=2,
        heads=4,
        head_dim=16,
        intermediate=96,
    )
