"""A checkpoint of the safetensors package: the last source of a refit, and a catalog."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transfuse
from safetensors.torch import save_file
from transfuse import Checkpoint, hf

TRAINER = """
import sys, torch, transfuse
from transfuse import hf
torch.manual_seed(3)
model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32))
trainer = transfuse.Publisher(*hf.layout(model), name="trainer0", job=sys.argv[1])
with trainer.write(5):
    pass
print("ready", flush=True)
sys.stdin.read()
"""


def module(seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32)).to(dtype)


def save(model: torch.nn.Module, path: Path, version: int | None = None) -> None:
    metadata = {"format": "pt"}
    if version is not None:
        metadata["transfuse.version"] = str(version)
    save_file(dict(model.named_parameters()), path, metadata=metadata)


def same(source: torch.nn.Module, target: torch.nn.Module) -> bool:
    pairs = zip(source.parameters(), target.parameters(), strict=True)
    return all(torch.equal(a.to(b.dtype), b) for a, b in pairs)


def receiver(model: torch.nn.Module, job: str, **options: object) -> transfuse.Receiver:
    return transfuse.Receiver(
        *hf.layout(model), name="engine0", job=job, checkpoint_wait_s=0.2, **options
    )


@pytest.mark.parametrize("into", ["in_place", "shadow"])
def test_first_weights_come_from_a_checkpoint_of_any_model(job, tmp_path, into):
    source, target = module(1), module(2, torch.bfloat16)
    save(source, tmp_path / "model.safetensors", version=4)
    given = Checkpoint(tmp_path)
    with receiver(target, job, checkpoint=given, into=into) as engine:
        report = engine.refit(timeout_s=30)
        assert (report.version, engine.version) == (4, 4)
        assert report.checkpoint == str(tmp_path)
        assert [(route.transport, route.route) for route in report.routes] == [("file", "pread")]
        assert report.verified_bytes == report.size_bytes
        assert "from checkpoint" in report.to_text()
        assert "next: checkpoint" in report.steps[-1].what
    assert same(source, target)


def test_a_trainer_that_is_killed_is_followed_by_its_checkpoint(job, tmp_path):
    saved, target = module(7), module(2)
    save(saved, tmp_path / "model.safetensors")
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, job],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "ready\n"
        given = Checkpoint(tmp_path / "model.safetensors", version=6)
        with receiver(target, job, checkpoint=given) as engine:
            report = engine.refit(timeout_s=30)
            assert (report.version, report.checkpoint) == (5, "")
            assert same(module(3), target)
            trainer.send_signal(signal.SIGKILL)
            trainer.wait(30)
            report = engine.refit(timeout_s=30)
            assert report.version == 6
            assert same(saved, target)
    finally:
        trainer.kill()
        trainer.communicate()


def test_a_version_that_nobody_says_is_not_guessed(job, tmp_path):
    save(module(1), tmp_path / "model.safetensors")
    with receiver(module(2), job, checkpoint=Checkpoint(tmp_path)) as engine:
        with pytest.raises(transfuse.DeadlineExceededError):
            engine.refit(timeout_s=1)
        steps = [step.what for step in engine.last_report.steps]
        assert any("given or recorded in its files, found neither" in what for what in steps)
    with pytest.raises(transfuse.InvalidArgumentError, match="expected a version from 1, found 0"):
        receiver(module(2), job, checkpoint=Checkpoint(tmp_path, version=0))


def test_the_catalog_of_an_unknown_model_is_in_its_files(tmp_path):
    tensors = {
        "b": torch.zeros(5, 3, dtype=torch.bfloat16),
        "a": torch.zeros(7),
        "s": torch.tensor(1.5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    catalog = transfuse.read_catalog(str(tmp_path))
    assert [(each.name, each.shape) for each in catalog] == [("a", (7,)), ("b", (5, 3)), ("s", ())]
    layouts = transfuse.make_layouts(catalog, transfuse.parse_parallel_spec("fsdp:dp=3"))
    for name, tensor in (("a", tensors["a"]), ("b", tensors["b"])):
        rows = [len(chunk) for chunk in tensor.chunk(3)]
        index = layouts[0].find_parameter(name)
        width = tensor[0].numel()
        held = [layout.parameters[index].element_count // width for layout in layouts]
        assert held == rows
    engine = transfuse.parse_parallel_spec("vllm:tp=2")
    with pytest.raises(transfuse.UnsupportedError, match="hf and fsdp without tp work"):
        transfuse.make_layouts(catalog, engine)
