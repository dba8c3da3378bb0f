"""FSDP2 trainers and a tensor parallel engine that is refitted while they train, all processes.

Usage: python live_training.py <options as JSON>; then commands (commanded.py). Over gloo in memory
of the host or over NCCL on GPUs, one a rank of either side.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transfuse
from commanded import Commanded, obey
from gpu_worker import CONFIG, layouts_of, shard_of, zeros
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Embedding, Linear, Module, ModuleList, RMSNorm
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu
from transfuse import fsdp2, torch_optimizer
from transfuse.demo.devices import BACKENDS

RANKS = 2
GROUP = "engine0"
WAIT_S = 60.0


class Attention(Module):
    """Grouped queries, normed heads; positions are known by the causal mask alone."""

    def __init__(self) -> None:
        super().__init__()
        hidden, self.size = CONFIG["hidden_size"], CONFIG["head_dim"]
        own = CONFIG["num_attention_heads"] * self.size
        shared = CONFIG["num_key_value_heads"] * self.size
        self.q_proj = Linear(hidden, own, bias=False)
        self.k_proj = Linear(hidden, shared, bias=False)
        self.v_proj = Linear(hidden, shared, bias=False)
        self.o_proj = Linear(own, hidden, bias=False)
        self.q_norm = RMSNorm(self.size)
        self.k_norm = RMSNorm(self.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of [row, place, hidden]."""
        q, k, v = (
            held(x).unflatten(-1, (-1, self.size))
            for held in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(Module):
    """Gated."""

    def __init__(self) -> None:
        super().__init__()
        hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj = Linear(hidden, inner, bias=False)
        self.up_proj = Linear(hidden, inner, bias=False)
        self.down_proj = Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of [row, place, hidden]."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(Module):
    """One of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(CONFIG["hidden_size"])
        self.self_attn = Attention()
        self.post_attention_layernorm = RMSNorm(CONFIG["hidden_size"])
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of [row, place, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(Module):
    """Named as the published checkpoint is."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Module()
        self.model.embed_tokens = Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.model.layers = ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.model.norm = RMSNorm(CONFIG["hidden_size"])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits; the head is the embedding."""
        hidden = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            hidden = layer(hidden)
        return self.model.norm(hidden) @ self.model.embed_tokens.weight.T


def state_file(folder: str, version: int) -> Path:
    """Where the trainers leave the gathered weights of a version."""
    return Path(folder) / f"version-{version}.pt"


class Trainer:
    """One rank of FSDP2; the hooks of its optimizer publish every step."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._rank, self._folder = options["rank"], options["folder"]
        self._place = torch.device(options["place"])
        if self._place.type == "cuda":
            torch.cuda.set_device(self._place)
        dist.init_process_group(
            BACKENDS[self._place.type, options["collectives"]],
            init_method=f"file://{self._folder}/rendezvous",
            rank=self._rank,
            world_size=RANKS,
            timeout=datetime.timedelta(seconds=WAIT_S),
        )
        torch.manual_seed(5)
        self._model = Decoder().to(self._place)
        mesh = init_device_mesh(self._place.type, (RANKS,), mesh_dim_names=("dp",))
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in (*self._model.model.layers, self._model):
            fully_shard(module, mesh=mesh, mp_policy=precision)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-2)
        layout, parameters = fsdp2.layout(self._model)
        self._publisher = transfuse.Publisher(
            layout,
            parameters,
            name=f"trainer{self._rank}",
            source_count=RANKS,
            snapshot_slots=2,
            job=options["job"],
            allow_any_tracer=True,
        )
        self._attached = torch_optimizer.attach(self._optimizer, self._publisher)
        self._tokens = torch.Generator().manual_seed(self._rank)

    def begin(self) -> int:
        """The weights before the first step."""
        version = self._attached.publish_now()
        self._keep(version)
        return version

    def train(self, steps: int, retention: str) -> dict[str, Any]:
        """So many steps, each one a version."""
        self._publisher.set_retention(retention)
        losses = [self._step() for _ in range(steps)]
        return {"version": self._attached.version, "losses": losses}

    def group(self) -> str:
        """What carries the collectives of its weights."""
        return dist.group.WORLD._get_backend(self._place).name()

    def leave(self) -> None:
        """The job, and the group of the trainers."""
        self._attached.detach()
        self._publisher.close()
        dist.destroy_process_group()

    def _step(self) -> float:
        shape = (4, 33)
        tokens = torch.randint(CONFIG["vocab_size"], shape, generator=self._tokens).to(self._place)
        logits = self._model(tokens[:, :-1])
        loss = cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._keep(self._attached.version)
        return loss.item()

    def _keep(self, version: int) -> None:
        """Gathered by torch itself: the judge."""
        whole = {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu()
            for name, p in self._model.named_parameters()
        }
        if self._rank == 0:
            torch.save(whole, state_file(self._folder, version))


class EngineRank:
    """One rank of an engine that commits as a group."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._folder = options["folder"]
        rank = options["rank"]
        if options["place"] != "cpu":
            torch.cuda.set_device(options["place"])
        self._layout = layouts_of(f"vllm:tp={RANKS}")[rank]
        self._parameters = zeros(self._layout, options["place"])
        self._receiver = transfuse.Receiver(
            self._layout,
            self._parameters,
            name=f"{GROUP}.tp{rank}",
            into="shadow",
            group=GROUP,
            group_size=RANKS,
            job=options["job"],
            guard=self._parameters,
        )
        self._held: dict[int, dict[str, torch.Tensor]] = {}
        self._routes: set[str] = set()

    def follow(self, until: int) -> list[int]:
        """Newer versions one after another, as fast as they come, up to this one."""
        seen = []
        while self._receiver.version < until:
            report = self._receiver.refit(at_least=self._receiver.version + 1, timeout_s=WAIT_S)
            assert report.verified_bytes == report.size_bytes > 0
            assert self._receiver.check_group().version == report.version
            # A copy of what is served now: compared when the trainers no longer wait for it.
            self._held[report.version] = {
                name: t.cpu().clone() for name, t in self._parameters.items()
            }
            self._routes |= {route.route for route in report.routes}
            seen.append(report.version)
        return seen

    def wrong(self) -> list[str]:
        """Parameters of any version that are not what the trainers had then, as bf16."""
        found = []
        for version, held in self._held.items():
            whole = torch.load(state_file(self._folder, version))
            wanted = shard_of(self._layout, lambda tensor, whole=whole: whole[tensor.name])
            found += [
                f"version {version}: {name}"
                for name, tensor in wanted.items()
                if not torch.equal(tensor, held[name])
            ]
        return found

    def routes(self) -> list[str]:
        """That the bytes took."""
        return sorted(self._routes)

    def leave(self) -> None:
        """The group and the job."""
        self._receiver.close()


@contextlib.contextmanager
def processes(
    job: str, folder: Path, collectives: str, places: Sequence[str]
) -> Iterator[tuple[list[Commanded], list[Commanded]]]:
    """Trainers and engine, rank by rank at these places; all are gone afterwards."""
    sides: tuple[list[Commanded], list[Commanded]] = ([], [])
    env = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    try:
        for kind, side in zip(("trainer", "engine"), sides, strict=True):
            for rank, place in enumerate(places):
                options = {
                    "kind": kind,
                    "rank": rank,
                    "place": place,
                    "collectives": collectives,
                    "job": job,
                    "folder": str(folder),
                }
                side.append(Commanded("live_training.py", options, env=env))
        each([*sides[0], *sides[1]])
        yield sides
    finally:
        for process in (*sides[0], *sides[1]):
            with contextlib.suppress(BrokenPipeError):
                process.end()


def each(side: Sequence[Commanded], do: str = "", **arguments: object) -> list[Any]:
    """The same command to all at once; without one their first words."""
    if do:
        for process in side:
            process.send(do, **arguments)
    return [process.said() for process in side]


def train_and_follow(
    job: str, folder: Path, collectives: str, places: Sequence[str]
) -> dict[str, Any]:
    """Trains in rounds of either retention while the engine follows; what it saw, and was."""
    with processes(job, folder, collectives, places) as (trainers, engine):
        last = each(trainers, "begin")[0]
        versions = [each(engine, "follow", until=last)]
        losses: list[float] = []
        for retention in ("in_place", "snapshot", "in_place"):
            steps = 4
            last += steps
            for process in trainers:
                process.send("train", steps=steps, retention=retention)
            versions.append(each(engine, "follow", until=last))
            trained = each(trainers)
            assert [each_one["version"] for each_one in trained] == [last] * len(trainers)
            losses += trained[0]["losses"]
        found = {
            "versions": versions,
            "losses": losses,
            "wrong": each(engine, "wrong"),
            "routes": each(engine, "routes"),
            "groups": each(trainers, "group"),
        }
        each([*engine, *trainers], "leave")
    return found


def judge(found: dict[str, Any], collectives: str) -> None:
    """All ranks had the same versions, rising, each of them bit for bit; the model learned."""
    assert found["groups"] == [collectives] * RANKS, found["groups"]
    assert not any(found["wrong"]), found["wrong"]
    ours, theirs = ([v for round_ in found["versions"] for v in round_[rank]] for rank in (0, 1))
    assert ours == theirs, "the ranks of a group"
    assert ours == sorted(set(ours)), ours
    assert all(round_[0] for round_ in found["versions"]), "a new version in every round"
    assert len(set(found["losses"])) == len(found["losses"]), "weights that change with each step"


def open_rank(options: dict[str, Any]) -> Trainer | EngineRank:
    """What this process is."""
    torch.set_num_threads(1)
    return {"trainer": Trainer, "engine": EngineRank}[options["kind"]](options)


if __name__ == "__main__":
    obey(open_rank)
