"""The catalog of a capture, from what the caller has of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from transfuse._module_layout import TORCH_DTYPES, dtype_of
from transfuse._transfuse import ModelConfig, TensorSpec, make_catalog, parse_model_config
from transfuse.errors import InvalidArgumentError, NotFoundError, UnsupportedError

Catalog = ModelConfig | str | Path | Mapping[str, object] | Sequence[TensorSpec]


def catalog_of(given: Catalog) -> list[TensorSpec]:
    """A ModelConfig, config.json (path, folder, text or dict), specs, or tensors by name."""
    if isinstance(given, ModelConfig):
        return make_catalog(given)
    if isinstance(given, str) and given.lstrip().startswith("{"):
        return make_catalog(parse_model_config(given))
    if isinstance(given, str | Path):
        path = Path(given)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise NotFoundError(f"catalog: {path} is no file; expected a config.json")
        return make_catalog(parse_model_config(path.read_text()))
    if isinstance(given, Mapping):
        if "model_type" in given:
            return make_catalog(parse_model_config(json.dumps(given)))
        return [_spec(name, value) for name, value in given.items()]
    specs = list(given)
    names = set()
    for spec in specs:
        if not isinstance(spec, TensorSpec):
            found = type(spec).__name__
            raise InvalidArgumentError(f"catalog: expected TensorSpec, found {found}")
        if spec.name in names:
            raise InvalidArgumentError(f"catalog: {spec.name} is listed twice")
        names.add(spec.name)
    return specs


def meta_tensor(spec: TensorSpec) -> torch.Tensor:
    """A tensor of this shape without memory."""
    dtype = TORCH_DTYPES.get(spec.dtype)
    if dtype is None:
        raise UnsupportedError(f"{spec.name}: torch has no {spec.dtype.text}")
    return torch.empty(spec.shape, dtype=dtype, device="meta")


def _spec(name: str, value: object) -> TensorSpec:
    if isinstance(value, TensorSpec):
        if value.name != name:
            raise InvalidArgumentError(f"catalog: {name} is described as {value.name}")
        return value
    if not isinstance(value, torch.Tensor):
        found = type(value).__name__
        message = f"catalog: {name}: expected a tensor or a TensorSpec, found {found}"
        raise InvalidArgumentError(f"{message} (a config.json has model_type)")
    return TensorSpec(name, dtype_of(name, value), tuple(value.shape))
