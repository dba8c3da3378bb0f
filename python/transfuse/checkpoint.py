"""Weights on disk that a receiver may fall back to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from transfuse._transfuse import NativeCheckpoint
from transfuse.demand import metadata_of
from transfuse.errors import InvalidArgumentError


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk, of one version, that a receiver may fall back to.

    `path` is a folder in the layout `spec` (for "hf" also a file); `config` the text of the model's
    config.json (None: that of the folder; without one "hf" and "fsdp:dp=N" are read by their own
    headers). `version` is the number of the weights in it; None: the one that every file records
    under "transfuse.version" in its metadata.

    `kind` and `metadata` answer what a receiver demands, besides what every file records
    ("transfuse.kind", and "transfuse.KEY" for any other key); both may not differ. Without a kind
    "hf" is "hf_raw", other specs state none. A demanded revision is compared with that of the
    files' tensors, summed once before anything is written.
    """

    path: str | os.PathLike[str]
    spec: str = "hf"
    config: str | None = None
    version: int | None = None
    kind: str | None = None
    metadata: Mapping[str, str | int] | None = None


def native_checkpoint(checkpoint: Checkpoint) -> NativeCheckpoint:
    """As the native receiver takes it."""
    if checkpoint.version is not None and checkpoint.version < 1:
        message = f"checkpoint: expected a version from 1, found {checkpoint.version}"
        raise InvalidArgumentError(message)
    return NativeCheckpoint(
        os.fspath(checkpoint.path),
        spec=checkpoint.spec,
        config_json=checkpoint.config or "",
        version=checkpoint.version or 0,
        kind=checkpoint.kind or "",
        metadata=metadata_of(checkpoint.metadata),
    )
