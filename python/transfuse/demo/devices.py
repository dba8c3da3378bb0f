"""Where the processes of a demo put their model: memory of the host, or the GPUs that there are."""

from __future__ import annotations

import torch

from transfuse.errors import UnsupportedError

CPU, CUDA = "cpu", "cuda"

# NCCL has no group in which two ranks share a GPU; gloo takes tensors of GPUs through the host.
# Both kinds are named: for "gloo" alone a mesh of GPUs makes a group of its own, with NCCL.
BACKENDS = {CPU: "gloo", CUDA: "cpu:gloo,cuda:gloo"}


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
