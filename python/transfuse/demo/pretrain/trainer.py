"""One FSDP2 trainer process: trains on command and publishes a version after every step.

Usage: python -m transfuse.demo.pretrain.trainer <rank> <settings>
"""

from __future__ import annotations

import datetime
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import transfuse
from transfuse import fsdp2, torch_optimizer
from transfuse.demo.channel import answer, commands
from transfuse.demo.devices import BACKENDS, collectives_of_trainers, device_of
from transfuse.demo.layouts import save_layout
from transfuse.demo.pretrain.settings import MODEL, TRAINERS, Settings
from transfuse.demo.pretrain.text import Tokenizer, read_corpus


class Trainer:
    """The sharded model, its data and its optimizer."""

    def __init__(self, rank: int, settings: Settings, device: torch.device) -> None:
        self.rank = rank
        self._device = device
        self.settings = settings
        corpus = read_corpus(Path(settings.text) if settings.text else None)
        tokenizer = Tokenizer(corpus, settings.vocabulary)
        self._tokens = torch.tensor(tokenizer.encode(corpus))
        self._windows = torch.Generator().manual_seed(settings.seed * TRAINERS + rank)
        torch.manual_seed(settings.seed)
        self.model = transformers.Qwen3ForCausalLM(settings.model_config()).float()
        torch.nn.Module.to(self.model, device)
        mesh = init_device_mesh(device.type, (TRAINERS,), mesh_dim_names=("dp",))
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.arena = fsdp2.move_to_arena(self.model, job=settings.job)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self._step = 0

    def step(self) -> float:
        """One optimizer step on a batch of random windows; the mean loss of all trainers."""
        self._step += 1
        self._set_learning_rate()
        length = self.settings.context + 1
        starts = torch.randint(
            len(self._tokens) - length, (self.settings.batch,), generator=self._windows
        )
        batch = torch.stack([self._tokens[start : start + length] for start in starts])
        batch = batch.to(self._device)
        logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total) / TRAINERS

    def reference(self) -> dict[str, torch.Tensor]:
        """Every parameter gathered by torch and cast by torch, without Transfuse."""
        gathered = {}
        for module in self.model.modules():
            if isinstance(module, torch.distributed.fsdp.FSDPModule):
                module.reshard()
        for name, parameter in self.model.named_parameters():
            gathered[name] = _whole(parameter.detach()).to(torch.bfloat16)
        return gathered

    def _set_learning_rate(self) -> None:
        progress = self._step / self.settings.steps
        warm = min(1.0, self._step / 8)
        for group in self.optimizer.param_groups:
            group["lr"] = (
                self.settings.learning_rate * warm * (0.55 + 0.45 * math.cos(progress * 3))
            )


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """Of a DTensor the parts of all ranks, in memory of the host: gloo gathers no GPU's."""
    if not isinstance(parameter, DTensor):
        return parameter.cpu()
    (placement,) = parameter.placements
    part = parameter.to_local().cpu()
    if not isinstance(placement, Shard):
        return part
    parts: list[torch.Tensor] = [torch.empty(0)] * TRAINERS
    dist.all_gather_object(parts, part)
    return torch.cat([each for each in parts if each.numel() > 0], dim=placement.dim)


def train(trainer: Trainer, publisher: transfuse.Publisher, collectives: str) -> None:
    """Serves commands; the hooks of the optimizer publish."""
    with torch_optimizer.attach(trainer.optimizer, publisher) as attached:
        answer("ready", version=attached.publish_now(), collectives=collectives)
        for command in commands():
            if command["do"] == "step":
                start = time.monotonic()
                loss = trainer.step()
                seconds = time.monotonic() - start
                answer("stepped", version=attached.version, loss=loss, step_s=seconds)
            elif command["do"] == "reference":
                gathered = trainer.reference()
                if trainer.rank == 0:
                    torch.save(gathered, command["path"])
                answer("reference", version=attached.version)


def main() -> None:
    """Joins the group, publishes, trains until told to stop."""
    rank, settings = int(sys.argv[1]), Settings.from_json(sys.argv[2])
    torch.set_num_threads(1)
    device = device_of(settings.device, rank)
    collectives = collectives_of_trainers(settings.device, TRAINERS)
    dist.init_process_group(
        BACKENDS[settings.device, collectives],
        init_method=f"file://{settings.path}/rendezvous",
        rank=rank,
        world_size=TRAINERS,
        timeout=datetime.timedelta(seconds=settings.deadline_s),
    )
    trainer = Trainer(rank, settings, device)
    layout, parameters = fsdp2.layout(trainer.model)
    save_layout(settings.path, f"trainer{rank}", layout)
    with transfuse.Publisher(
        layout,
        parameters,
        name=f"trainer{rank}",
        model=MODEL,
        source_count=TRAINERS,
        drain_s=settings.deadline_s / 4,
        job=settings.job,
    ) as publisher:
        train(trainer, publisher, collectives)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
