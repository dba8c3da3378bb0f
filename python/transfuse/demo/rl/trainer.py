"""One trainer process: learns from rollouts and publishes a snapshot after every step.

Usage: python -m transfuse.demo.rl.trainer <rank> <settings>
"""

from __future__ import annotations

import abc
import datetime
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import transfuse
from transfuse import fsdp2
from transfuse.demo.channel import Message, answer, commands
from transfuse.demo.devices import BACKENDS, collectives_of_trainers, device_of
from transfuse.demo.layouts import save_layout
from transfuse.demo.rl.settings import MODEL, TRAINERS, Settings

SNAPSHOT_SLOTS = 2  # one that engines read while the next is copied


class Trainer(abc.ABC):
    """The sharded policy and its optimizer; what a framework is to do of a step."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self._device = device
        self._step = 0

    @abc.abstractmethod
    def layout(self) -> tuple[transfuse.Layout, dict[str, torch.Tensor]]:
        """What this process holds of the policy."""

    @abc.abstractmethod
    def logits(self, text: torch.Tensor) -> torch.Tensor:
        """Of every token that may follow, at every place of every row."""

    @abc.abstractmethod
    def learn(self, loss: torch.Tensor, learning_rate: float) -> None:
        """One step of the optimizer with gradients of at most norm 1."""

    def first_model(self) -> transformers.Qwen3ForCausalLM:
        """The whole policy as every run with this seed begins."""
        torch.manual_seed(self.settings.seed)
        config = transformers.Qwen3Config(**self.settings.model_config())
        model: transformers.Qwen3ForCausalLM = transformers.Qwen3ForCausalLM(config).float()
        return model

    def step(self, rollout: Message) -> dict[str, float]:
        """One step of the clipped policy gradient; the numbers are means over all trainers."""
        prompts, tokens, drawn_with, advantages = (
            torch.tensor(rollout[name], device=self._device)
            for name in ("prompts", "tokens", "log_probabilities", "advantages")
        )
        text = torch.cat((prompts, tokens), dim=1)
        logits = self.logits(text[:, :-1])
        log_p = logits[:, prompts.shape[1] - 1 :].log_softmax(dim=-1)
        log_p = log_p.gather(2, tokens[..., None]).squeeze(2)
        ratio = (log_p - drawn_with).exp()
        clipped = ratio.clamp(1 - self.settings.clip, 1 + self.settings.clip)
        loss = -torch.min(ratio * advantages, clipped * advantages).mean()
        self.learn(loss, self._learning_rate())
        numbers = torch.stack((ratio.detach().mean(), (ratio != clipped).float().mean()))
        dist.all_reduce(numbers)
        ratio_mean, clipped_share = (numbers / TRAINERS).tolist()
        return {"ratio": ratio_mean, "clipped": clipped_share}

    def _learning_rate(self) -> float:
        progress = self._step / self.settings.steps
        self._step += 1
        return self.settings.learning_rate * (1 - 0.8 * progress)


class FsdpTrainer(Trainer):
    """FSDP2 over all trainers; each learns from its share of a rollout."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        self._model = self.first_model()
        torch.nn.Module.to(self._model, device)
        mesh = init_device_mesh(device.type, (TRAINERS,), mesh_dim_names=("dp",))
        for layer in self._model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self._model, mesh=mesh)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def layout(self) -> tuple[transfuse.Layout, dict[str, torch.Tensor]]:
        """See Trainer."""
        return fsdp2.layout(self._model)

    def logits(self, text: torch.Tensor) -> torch.Tensor:
        """See Trainer."""
        logits: torch.Tensor = self._model(input_ids=text, use_cache=False).logits
        return logits

    def learn(self, loss: torch.Tensor, learning_rate: float) -> None:
        """See Trainer."""
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()


def make_trainer(settings: Settings, device: torch.device) -> Trainer:
    """The trainer that the settings name."""
    if settings.trainer.startswith("megatron"):
        from transfuse.demo.rl.megatron_trainer import MegatronTrainer

        return MegatronTrainer(settings, device)
    return FsdpTrainer(settings, device)


def publish(publisher: transfuse.Publisher, version: int) -> dict[str, float]:
    """Offers a copy of the weights; how long this kept the trainer from its work."""
    start = time.perf_counter()
    publisher.begin_write(version)
    timing = publisher.publish(version)
    milliseconds = (time.perf_counter() - start) * 1e3
    return {"publish_ms": milliseconds, "copy_ms": timing.copy_us / 1e3}


def train(trainer: Trainer, publisher: transfuse.Publisher, collectives: str) -> None:
    """Serves commands until the end of input."""
    version = 1
    answer("ready", version=version, collectives=collectives, **publish(publisher, version))
    for command in commands():
        start = time.perf_counter()
        numbers = trainer.step(command)
        seconds = time.perf_counter() - start
        if command["stop"]:
            os.kill(os.getpid(), signal.SIGSTOP)  # the other one publishes, this one has not
        version += 1
        timing = publish(publisher, version)
        answer("stepped", version=version, step_s=seconds, **numbers, **timing)


def main() -> None:
    """Joins the group, publishes, learns until told to end."""
    rank, settings = int(sys.argv[1]), Settings.from_json(sys.argv[2])
    torch.set_num_threads(1)
    device = device_of(settings.device, rank)
    collectives = collectives_of_trainers(settings.device, TRAINERS)
    dist.init_process_group(
        BACKENDS[settings.device, collectives],
        init_method=f"file://{settings.path}/rendezvous-trainers",
        rank=rank,
        world_size=TRAINERS,
        timeout=datetime.timedelta(seconds=settings.deadline_s),
    )
    trainer = make_trainer(settings, device)
    layout, parameters = trainer.layout()
    save_layout(settings.path, f"trainer{rank}", layout)
    with transfuse.Publisher(
        layout,
        parameters,
        name=f"trainer{rank}",
        model=MODEL,
        source_count=TRAINERS,
        drain_s=settings.deadline_s / 4,
        retention="snapshot",
        snapshot_slots=SNAPSHOT_SLOTS,
        job=settings.job,
    ) as publisher:
        train(trainer, publisher, collectives)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
