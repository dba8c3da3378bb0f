"""A source in a process of its own, and what it and the tests agree on: layouts and their values.

Usage: python gpu_worker.py <options as JSON>; then commands (commanded.py).
"""

from __future__ import annotations

import functools
import json
import time
import zlib
from collections.abc import Callable

import torch
import transfuse
from commanded import obey

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LONG_KERNEL_CYCLES = 2_000_000_000  # about a second: beyond every launch and message


def layouts_of(spec: str, elements: int = 0) -> list[transfuse.Layout]:
    """By rank; of one tensor of so many elements in bf16 where a number is given."""
    if elements == 0:
        config = transfuse.parse_model_config(json.dumps(CONFIG))
        return transfuse.make_layouts(config, transfuse.parse_parallel_spec(spec))
    builder = transfuse.LayoutBuilder()
    tensor = builder.tensor("w", transfuse.Dtype.BF16, (elements,))
    parameter = builder.parameter("w", transfuse.Dtype.BF16, elements)
    builder.tile(tensor, transfuse.Box.whole((elements,)), parameter)
    return [builder.build()]


def zeros(layout: transfuse.Layout, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A flat tensor for every parameter."""
    return {
        p.name: torch.zeros(p.element_count, dtype=DTYPES[p.dtype.name], device=device)
        for p in layout.parameters
    }


def values(layout: transfuse.Layout, version: int) -> dict[str, torch.Tensor]:
    """What a holder of this layout holds of a version, made on the CPU without Transfuse."""
    return shard_of(layout, lambda tensor: _whole(tensor.name, tensor.shape, version))


def shard_of(
    layout: transfuse.Layout, whole_of: Callable[[transfuse.TensorSpec], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a holder of this layout holds of whole tensors, cut by torch alone."""
    found = zeros(layout)
    names = [p.name for p in layout.parameters]
    for tile in layout.tiles:
        tensor, box = layout.tensors[tile.tensor], tile.box
        places = zip(box.offset, box.length, strict=True)
        part = whole_of(tensor)[tuple(slice(begin, begin + count) for begin, count in places)]
        flat = found[names[tile.parameter]]
        flat.as_strided(box.length, tile.element_strides, tile.element_offset).copy_(part)
    return found


@functools.cache
def _whole(name: str, shape: tuple[int, ...], version: int) -> torch.Tensor:
    seed = zlib.crc32(f"{name} {version}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def queue_late_writes(parameters: dict, wanted: dict, stream: torch.cuda.Stream) -> None:
    """A kernel of a second and then the writes, on a stream of their own: nothing is waited for."""
    ready = {name: tensor.to(parameters[name].device) for name, tensor in wanted.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_KERNEL_CYCLES)
        for name, tensor in ready.items():
            parameters[name].copy_(tensor, non_blocking=True)


class Source:
    """The publisher of one rank."""

    def __init__(self, options: dict) -> None:
        rank = options["rank"]
        self._layout = layouts_of(options["spec"], options["elements"])[rank]
        self._parameters = zeros(self._layout, options["place"])
        self._publisher = transfuse.Publisher(
            self._layout,
            self._parameters,
            name=f"trainer{rank}",
            source_count=options["source_count"],
            job=options["job"],
            **options["publisher"],
        )

    def publish(self, version: int) -> dict:
        """Writes and publishes."""
        wanted = values(self._layout, version)
        with self._publisher.write(version):
            for name, tensor in wanted.items():
                self._parameters[name].copy_(tensor)
        return {"device": self._publisher.device}

    def publish_late(self, version: int) -> dict:
        """What is published is still being written by the GPU when publish() is called."""
        stream = torch.cuda.Stream()
        self._publisher.begin_write(version)
        queue_late_writes(self._parameters, values(self._layout, version), stream)
        with torch.cuda.stream(stream):
            queued = not stream.query()
            start = time.monotonic()
            self._publisher.publish(version)
        return {"queued": queued, "seconds": time.monotonic() - start}

    def spoil(self, version: int) -> dict:
        """Writes what nobody is to see, as soon as it may."""
        timing = self._publisher.begin_write(version)
        self.scribble()
        self._publisher.abort_write("nobody is to see it")
        return {"copy_waited_us": timing.copy_waited_us}

    def scribble(self) -> None:
        """Writes outside of a version, as a trainer with snapshots may."""
        for tensor in self._parameters.values():
            tensor.fill_(7)


if __name__ == "__main__":
    obey(Source)
