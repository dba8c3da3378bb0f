#!/usr/bin/env python3
"""Measures `transfuse convert` beside `cp` of the same bytes, in one run on one disk.

    bench/convert.py --build build/dev [--layers 8] [--repetitions 5] [--folder DIR] [--json FILE]

The model is Qwen3-4B with fewer layers. Sources are in the page cache; both sides are timed until
the disk has what they wrote (`cp`, then `sync -f` of the copy), and what they wrote is removed
and synced away before the next. cp and the conversion take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAIRS = [
    ("hf", "hf"),
    ("hf", "fsdp:dp=4"),
    ("fsdp:dp=4", "vllm:tp=2"),
    ("vllm:tp=2", "hf"),
    ("hf", "vllm:tp=2"),
]


def make_model(command: Path, folder: Path, layers: int) -> None:
    """An hf checkpoint of random bytes with the shapes that the command names."""
    folder.mkdir()
    config = {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    listed = subprocess.run(
        [command, "inspect", "hf", "--config", folder / "config.json", "--json"],
        check=True,
        stdout=subprocess.PIPE,
    )
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # as transformers writes it
    at = 0
    for tensor in json.loads(listed.stdout)["tensors"]:
        end = at + tensor["size_bytes"]
        header[tensor["name"]] = {
            "dtype": "BF16",
            "shape": tensor["shape"],
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while at > 0:
            file.write(os.urandom(min(at, 1 << 24)))
            at -= min(at, 1 << 24)


def settle(folder: Path) -> None:
    """Nothing is on its way to the disk any more."""
    subprocess.run(["sync", "-f", folder], check=True)


def timed_copy(source: Path, target: Path) -> float:
    """Seconds of cp and of the sync after it."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    settle(target)
    return time.perf_counter() - start


def timed_convert(
    command: Path, config: Path, source: tuple[str, Path], target: tuple[str, Path]
) -> float:
    """Seconds of the whole command, which syncs before it ends."""
    start = time.perf_counter()
    line: list[str | Path] = [command, "convert", "--config", config]
    line += ["--from", source[0], source[1], "--to", target[0], target[1]]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(command: Path, work: Path, layers: int, repetitions: int) -> list[dict[str, object]]:
    """One row for each pair of layouts."""
    make_model(command, work / "hf", layers)
    config = work / "hf/config.json"
    rows: list[dict[str, object]] = []
    for source_spec, target_spec in PAIRS:
        source = work / source_spec
        if not source.exists():
            timed_convert(command, config, ("hf", work / "hf"), (source_spec, source))
        copies, conversions = [], []
        for _ in range(repetitions):
            settle(work)
            copies.append(size_of(source) / timed_copy(source, work / "out"))
            shutil.rmtree(work / "out")
            settle(work)
            seconds = timed_convert(
                command, config, (source_spec, source), (target_spec, work / "out")
            )
            conversions.append(size_of(work / "out") / seconds)
            shutil.rmtree(work / "out")
        copied, converted = statistics.median(copies), statistics.median(conversions)
        row: dict[str, object] = {
            "from": source_spec,
            "to": target_spec,
            "gigabytes": size_of(source) / 1e9,
            "cp_gigabytes_per_second": copied / 1e9,
            "convert_gigabytes_per_second": converted / 1e9,
            "ratio": converted / copied,
        }
        rows.append(row)
        sys.stdout.write(
            f"{source_spec:>10} -> {target_spec:<10} {size_of(source) / 1e9:6.2f} GB   "
            f"cp {copied / 1e9:5.2f} GB/s   convert {converted / 1e9:5.2f} GB/s   "
            f"ratio {converted / copied:.2f} (target 0.8)\n"
        )
        sys.stdout.flush()
    return rows


def main() -> None:
    """Measures and prints a line for each pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--build", type=Path, default=HERE.parent / "build/dev")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; the disk that is measured")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    command = arguments.build / "bin/transfuse"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        rows = measure(command, Path(work), arguments.layers, arguments.repetitions)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
