"""The reference engine: Qwen3 with the fused, tensor parallel parameters of vLLM. Needs torch.

Small and exact rather than fast on large models: for tests, demos and as a model of where a refit
goes into an engine. Weights holds the parameters of one rank and their layout, Engine generates.
"""

from __future__ import annotations

from transfuse.engine.architecture import Architecture
from transfuse.engine.engine import Engine, MixedVersionsError, SafePoint
from transfuse.engine.parallel import TensorParallel
from transfuse.engine.requests import Completions, Request
from transfuse.engine.weights import Weights

__all__ = [
    "Architecture",
    "Completions",
    "Engine",
    "MixedVersionsError",
    "Request",
    "SafePoint",
    "TensorParallel",
    "Weights",
]
