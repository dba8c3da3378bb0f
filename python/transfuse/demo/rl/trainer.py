"""One FSDP2 trainer process: learns from rollouts and publishes a snapshot after every step.

Usage: python -m transfuse.demo.rl.trainer <rank> <settings>
"""

from __future__ import annotations

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
from transfuse.demo.layouts import save_layout
from transfuse.demo.rl.settings import MODEL, TRAINERS, Settings

SNAPSHOT_SLOTS = 2  # one that engines read while the next is copied


class Trainer:
    """The sharded policy and its optimizer."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._step = 0
        torch.manual_seed(settings.seed)
        config = transformers.Qwen3Config(**settings.model_config())
        self.model = transformers.Qwen3ForCausalLM(config).float()
        mesh = init_device_mesh("cpu", (TRAINERS,), mesh_dim_names=("dp",))
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, rollout: Message) -> dict[str, float]:
        """One step of the clipped policy gradient; the numbers are means over all trainers."""
        self._set_learning_rate()
        prompts, tokens = torch.tensor(rollout["prompts"]), torch.tensor(rollout["tokens"])
        drawn_with = torch.tensor(rollout["log_probabilities"])
        advantages = torch.tensor(rollout["advantages"])
        text = torch.cat((prompts, tokens), dim=1)
        logits = self.model(input_ids=text[:, :-1], use_cache=False).logits
        log_p = logits[:, prompts.shape[1] - 1 :].log_softmax(dim=-1)
        log_p = log_p.gather(2, tokens[..., None]).squeeze(2)
        ratio = (log_p - drawn_with).exp()
        clipped = ratio.clamp(1 - self._settings.clip, 1 + self._settings.clip)
        loss = -torch.min(ratio * advantages, clipped * advantages).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        numbers = torch.stack((ratio.detach().mean(), (ratio != clipped).float().mean()))
        dist.all_reduce(numbers)
        ratio_mean, clipped_share = (numbers / TRAINERS).tolist()
        return {"ratio": ratio_mean, "clipped": clipped_share}

    def _set_learning_rate(self) -> None:
        progress = self._step / self._settings.steps
        self._step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * (1 - 0.8 * progress)


def publish(publisher: transfuse.Publisher, version: int) -> dict[str, float]:
    """Offers a copy of the weights; how long this kept the trainer from its work."""
    start = time.perf_counter()
    publisher.begin_write(version)
    timing = publisher.publish(version)
    milliseconds = (time.perf_counter() - start) * 1e3
    return {"publish_ms": milliseconds, "copy_ms": timing.copy_us / 1e3}


def train(trainer: Trainer, publisher: transfuse.Publisher) -> None:
    """Serves commands until the end of input."""
    version = 1
    answer("ready", version=version, **publish(publisher, version))
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
    dist.init_process_group(
        "gloo",
        init_method=f"file://{settings.path}/rendezvous-trainers",
        rank=rank,
        world_size=TRAINERS,
        timeout=datetime.timedelta(seconds=settings.deadline_s),
    )
    trainer = Trainer(settings)
    layout, parameters = fsdp2.layout(trainer.model)
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
        train(trainer, publisher)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
