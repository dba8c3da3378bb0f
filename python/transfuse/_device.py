"""Which GPU a caller means, and waiting for what it has queued there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

from transfuse.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch


def ordinal_of(device: int | str | torch.device | None) -> int | None:
    """0, "cuda:0" and torch.device("cuda", 0) are the same GPU; "cuda" is torch's current one."""
    if device is None or (isinstance(device, int) and device >= 0):
        return device
    found = re.fullmatch(r"cuda(?::(\d+))?", str(device))
    if found is None:
        message = f"device: expected a GPU as 0 or 'cuda:0', or None, found {device!r}"
        raise InvalidArgumentError(message)
    if found[1] is not None:
        return int(found[1])
    torch = _torch_with_cuda()
    return 0 if torch is None else int(torch.cuda.current_device())


def gpu_of(tensors: Iterable[torch.Tensor]) -> int | None:
    """The GPU that tensors lie on; None: memory of the host. They must lie together."""
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        message = f"parameters lie on {' and '.join(devices)}: expected all of them on one device"
        raise InvalidArgumentError(message)
    return None if devices in ([], ["cpu"]) else ordinal_of(devices[0])


def finish_queued_work(device: int | None) -> None:
    """Waits for what was queued on torch's current stream of `device`; None: for nothing.

    Work on other streams, or of other frameworks, is the caller's to wait for.
    """
    if device is None:
        return
    torch = _torch_with_cuda()
    if torch is not None:
        torch.cuda.current_stream(device).synchronize()


def _torch_with_cuda() -> ModuleType | None:
    """Torch, if it has been used with CUDA: it is not imported here, nor does it open a GPU."""
    loaded = sys.modules.get("torch")
    return loaded if loaded is not None and loaded.cuda.is_initialized() else None
