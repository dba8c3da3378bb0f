"""What the forward pass needs to know of a model, from an HF config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass

from transfuse._transfuse import ModelConfig, parse_model_config
from transfuse.errors import UnsupportedError

# What transformers' Qwen3Config takes where config.json says nothing.
_DEFAULT_ROPE_THETA = 10000.0
_DEFAULT_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Architecture:
    """A dense Qwen3 model: its sizes, and the numbers that no layout needs."""

    model: ModelConfig
    rope_theta: float
    norm_epsilon: float

    @staticmethod
    def parse(text: str) -> Architecture:
        """Reads the text of config.json. UnsupportedError where it asks for another computation."""
        model = parse_model_config(text)
        if model.architecture != "qwen3":
            message = f"the reference engine computes qwen3, config.json says {model.architecture}"
            raise UnsupportedError(message)
        config = json.loads(text)
        # transformers 5 writes rope_parameters, 4 writes rope_theta and rope_scaling.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        _expect("rope_type", rope_type, "default")
        _expect("hidden_act", config.get("hidden_act", "silu"), "silu")
        for kind in config.get("layer_types") or ():
            _expect("layer_types", kind, "full_attention")
        _expect("use_sliding_window", config.get("use_sliding_window") or False, False)
        theta = rope.get("rope_theta", config.get("rope_theta", _DEFAULT_ROPE_THETA))
        epsilon = config.get("rms_norm_eps", _DEFAULT_NORM_EPSILON)
        return Architecture(model=model, rope_theta=float(theta), norm_epsilon=float(epsilon))


def _expect(field: str, found: object, expected: object) -> None:
    if found != expected:
        message = f"config.json: {field} is {found!r}; the reference engine knows {expected!r}"
        raise UnsupportedError(message)
