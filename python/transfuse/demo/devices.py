"""Where the processes of a demo put their model: memory of the host, or the GPUs that there are."""

from __future__ import annotations

import torch

from transfuse.errors import UnsupportedError

CPU, CUDA = "cpu", "cuda"

# Of the collectives of a group. Where models lie on GPUs both kinds of device are named: for "gloo"
# alone a mesh of GPUs makes a group of its own, with NCCL. Gloo takes tensors of GPUs through the
# host.
GLOO, NCCL = "gloo", "nccl"
BACKENDS = {
    (CPU, GLOO): "gloo",
    (CUDA, GLOO): "cpu:gloo,cuda:gloo",
    (CUDA, NCCL): "cpu:gloo,cuda:nccl",
}


def choose_collectives(kind: str, *, ranks: int, gpus: int) -> str:
    """NCCL where every rank has a GPU of its own, which it asks for; else gloo."""
    return NCCL if kind == CUDA and gpus >= ranks else GLOO


def collectives_of_trainers(kind: str, ranks: int) -> str:
    """The choice on this machine. Opens no GPU."""
    gpus = torch.cuda.device_count() if kind == CUDA else 0
    return choose_collectives(kind, ranks=ranks, gpus=gpus)


def in_words(kind: str, collectives: str) -> str:
    """For whoever watches a run."""
    if kind == CPU:
        return "over gloo"
    if collectives == NCCL:
        return "over NCCL, on a GPU each"
    return "over gloo, since NCCL has no group with two ranks on one GPU"


def check(kind: str) -> None:
    """UnsupportedError where GPUs are asked for and there is none. Opens none."""
    if kind == CPU or torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    else:
        reason = "torch sees no GPU (nvidia-smi says whether there is a driver and a GPU; "
        reason += "CUDA_VISIBLE_DEVICES may hide them)"
    raise UnsupportedError(f"no CUDA device: {reason}")


def device_of(kind: str, number: int) -> torch.device:
    """For the process with this number; GPUs are dealt in turn. Becomes torch's current device."""
    if kind == CPU:
        return torch.device(CPU)
    check(kind)
    device = torch.device(CUDA, number % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
