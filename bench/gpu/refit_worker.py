"""One process of the refit measurement: a rank of the source or of the target, told what to do."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
import traceback
import zlib
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing  # how tensors of a GPU are pickled: by CUDA IPC
import transfuse
from transfuse.arena import aligned

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
ALIGNMENT_BYTES = 512  # of parameters in one buffer, as torch's allocator has it
PACKED_BYTES = 1 << 30
PHASES = ("discover", "lease", "transfer", "verify", "commit", "total")
MATRIX = 8192  # rows and columns of the product beside a refit
Seconds = list[float]


def synchronize(place: str) -> None:
    """Waits for a GPU."""
    if place != "cpu":
        torch.cuda.synchronize(place)


def wait_for_stream(place: str) -> None:
    """Waits for what the current stream of a GPU was given."""
    if place != "cpu":
        torch.cuda.current_stream(place).synchronize()


class Worker:
    """Its public methods are the commands; all of them return what can be pickled."""

    def __init__(self, name: str, job: str) -> None:
        self._name = name
        self._job = job
        self._place = "cpu"
        self._device: str | None = None
        self._mapped = False  # the parameters lie in memory of the host that readers map
        self._layout: transfuse.Layout | None = None
        self._parameters: dict[str, torch.Tensor] = {}
        self._publisher: transfuse.Publisher | None = None
        self._receiver: transfuse.Receiver | None = None
        self._borrowed: list[torch.Tensor] = []

    def allocate(
        self,
        config: str,
        spec: str,
        rank: int,
        place: str,
        *,
        flat: bool,
        device: str | None = None,
        arena: bool = False,
    ) -> dict[str, int]:
        """The parameters of a rank: a tensor each, or views of one buffer for each dtype.

        `device` is what a receiver in the host takes from; `arena`: the host's lie in memory that
        readers map.
        """
        self.free()
        self._device = device if place == "cpu" else None
        self._mapped = arena and place == "cpu"
        parsed = transfuse.parse_model_config(config)
        self._layout = transfuse.make_layout(parsed, transfuse.parse_parallel_spec(spec), rank)
        self._place = place
        specs = self._layout.parameters
        if self._mapped:
            self._parameters = self._in_an_arena()
        elif flat:
            self._parameters = self._views()
        else:
            self._parameters = {
                p.name: torch.zeros(p.element_count, dtype=DTYPES[p.dtype.name], device=place)
                for p in specs
            }
        synchronize(place)
        return {
            "bytes": sum(t.nbytes for t in self._parameters.values()),
            "tensors": len(self._layout.tensors),
            "parameters": len(specs),
        }

    def free(self) -> None:
        """Everything, also what torch keeps for later."""
        self.close()
        self._borrowed = []
        self._parameters = {}
        self._layout = None
        if self._place != "cpu":
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def fill(self, seed: int) -> None:
        """The values of this seed, the same for whoever holds the same element."""
        for place, part in self._tiles(seed):
            place.copy_(part)
        synchronize(self._place)

    def check(self, seed: int) -> int:
        """How many tiles do not hold the values of this seed."""
        wrong = torch.zeros((), dtype=torch.int64, device=self._place)
        for place, part in self._tiles(seed):
            wrong += (place != part.to(place.device, place.dtype)).any()
        return int(wrong)

    def open_publisher(
        self,
        source_count: int,
        retention: str = "in_place",
        slots: int = 0,
        snapshot_place: str = "with_weights",
    ) -> float:
        """Milliseconds."""
        start = time.perf_counter()
        self._publisher = transfuse.Publisher(
            self._layout_here(),
            self._parameters,
            name=self._name,
            source_count=source_count,
            retention=retention,
            snapshot_slots=slots or None,
            snapshot_place=snapshot_place,
            job=self._job,
            allow_any_tracer=None if self._mapped else True,
        )
        return (time.perf_counter() - start) * 1e3

    def publish(self, version: int) -> dict[str, float]:
        """The weights as they are. Milliseconds."""
        assert self._publisher is not None
        start = time.perf_counter()
        self._publisher.begin_write(version)
        timing = self._publisher.publish(version)
        return {"publish": (time.perf_counter() - start) * 1e3, "copy": timing.copy_us / 1e3}

    def open_receiver(self, *, fingerprints: bool, shadow: bool = False) -> float:
        """Milliseconds."""
        start = time.perf_counter()
        self._receiver = transfuse.Receiver(
            self._layout_here(),
            self._parameters,
            name=self._name,
            verify=transfuse.Verify.FULL if fingerprints else transfuse.Verify.OFF,
            into="shadow" if shadow else "in_place",
            job=self._job,
            device=self._device,
        )
        return (time.perf_counter() - start) * 1e3

    def refit(self, version: int) -> dict[str, Any]:
        """What the report says, in milliseconds and bytes."""
        assert self._receiver is not None
        start = time.perf_counter()
        report = self._receiver.refit(exactly=version, timeout_s=120)
        found: dict[str, Any] = {"wall": (time.perf_counter() - start) * 1e3}
        found |= {name: getattr(report.phases, f"{name}_us") / 1e3 for name in PHASES}
        found |= {
            "bytes": report.size_bytes,
            "source_bytes": report.source_bytes,
            "verified_bytes": report.verified_bytes,
            "planned": report.planned,
            "routes": sorted({route.route for route in report.routes}),
        }
        return found

    def close(self) -> None:
        """Publisher and receiver."""
        for member in (self._publisher, self._receiver):
            if member is not None:
                member.close()
        self._publisher = self._receiver = None

    def held(self) -> dict[str, int]:
        """What this process and its GPUs have taken."""
        with open("/proc/self/statm") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found = {"resident_bytes": resident, "descriptors": len(os.listdir("/proc/self/fd"))}
        if self._place != "cpu":
            for device in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(device)
                found[f"gpu{device}_bytes"] = total - free
        return found

    def copy_rate(
        self, source: str, target: str, size_bytes: int, repetitions: int, *, pinned: bool = False
    ) -> list[float]:
        """GB/s of torch's copy of one buffer: one cudaMemcpyAsync, or memcpy.

        `pinned`: what lies in the host is locked there, where there is a GPU.
        """
        pinned = pinned and torch.cuda.is_available()

        def buffer(place: str) -> torch.Tensor:
            locked = pinned and place == "cpu"
            made = torch.empty(size_bytes, dtype=torch.uint8, device=place, pin_memory=locked)
            return made.fill_(1)

        from_here, to_here = buffer(source), buffer(target)
        rates = []
        for _ in range(repetitions + 1):
            synchronize(source)
            synchronize(target)
            start = time.perf_counter()
            to_here.copy_(from_here, non_blocking=True)
            synchronize(source)
            synchronize(target)
            rates.append(size_bytes / (time.perf_counter() - start) / 1e9)
        del from_here, to_here
        if {source, target} != {"cpu"}:
            torch.cuda.empty_cache()
        return rates[1:]

    def lend(self) -> list[tuple[str, bytes]]:
        """A handle of CUDA IPC for every parameter, as torch.multiprocessing makes them."""
        return [(name, bytes(ForkingPickler.dumps(t))) for name, t in self._parameters.items()]

    def borrow_and_copy(self, handles: list[tuple[str, bytes]], repetitions: int) -> Seconds:
        """Seconds to open all handles and to copy tensor by tensor, then to copy alone."""
        seconds = []
        start = time.perf_counter()
        self._borrowed = [pickle.loads(handle) for _, handle in handles]
        for _ in range(repetitions + 1):
            for (name, _), tensor in zip(handles, self._borrowed, strict=True):
                self._parameters[name].copy_(tensor, non_blocking=True)
            synchronize(self._place)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        self._borrowed = []
        return seconds

    def join_nccl(self, rank: int, store: str) -> None:
        """A group of two: the first source and the first target."""
        torch.cuda.set_device(self._place)
        dist.init_process_group(
            "nccl",
            init_method=f"file://{store}",
            rank=rank,
            world_size=2,
            device_id=torch.device(self._place),
        )

    def broadcast(self, repetitions: int, *, packed: bool) -> Seconds:
        """From rank 0 to rank 1, a tensor at a time or through one buffer."""
        tensors = [self._parameters[name] for name in sorted(self._parameters)]
        work = self._broadcast_packed if packed else self._broadcast_each
        seconds = []
        for _ in range(repetitions + 1):
            dist.barrier()
            synchronize(self._place)
            start = time.perf_counter()
            work(tensors)
            synchronize(self._place)
            seconds.append(time.perf_counter() - start)
        return seconds[1:]

    def leave_nccl(self) -> None:
        """Ends the group."""
        dist.destroy_process_group()

    def multiply(self, seconds: float) -> float:
        """TFLOP/s of a bf16 matrix product, alone on this GPU."""
        return self._multiply_until(time.perf_counter() + seconds, None)

    def multiply_beside(
        self, version: int, gigabytes_per_second: float, multiprocessors: int
    ) -> dict[str, float]:
        """The same while a version arrives in the shadow, and how long that takes."""
        assert self._receiver is not None
        start = time.perf_counter()
        stage = self._receiver.stage(
            exactly=version,
            timeout_s=120,
            max_gigabytes_per_second=gigabytes_per_second,
            max_multiprocessors=multiprocessors,
        )
        rate = self._multiply_until(start + 60, stage)
        seconds = time.perf_counter() - start
        stage.wait(60)
        self._receiver.commit(timeout_s=60)
        return {"tflops": rate, "stage_s": seconds}

    def _multiply_until(self, until: float, stage: transfuse.Stage | None) -> float:
        """TFLOP/s until a moment, or until the stage no longer moves."""
        shape = (MATRIX, MATRIX)
        left, right, out = (
            torch.ones(shape, dtype=torch.bfloat16, device=self._place) for _ in range(3)
        )
        synchronize(self._place)
        # Its own stream, which is all that is waited for: the device is the stage's too.
        own: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._place != "cpu":
            own = torch.cuda.stream(torch.cuda.Stream(self._place))
        with own:
            return self._multiply_on_stream(until, stage, left, right, out)

    def _multiply_on_stream(
        self,
        until: float,
        stage: transfuse.Stage | None,
        left: torch.Tensor,
        right: torch.Tensor,
        out: torch.Tensor,
    ) -> float:
        torch.matmul(left, right, out=out)  # loads the kernel
        wait_for_stream(self._place)
        count, start = 0, time.perf_counter()
        while time.perf_counter() < until:
            torch.matmul(left, right, out=out)
            wait_for_stream(self._place)
            count += 1
            if stage is not None and stage.progress.state != transfuse.StageState.MOVING:
                break
        return count * 2.0 * MATRIX**3 / (time.perf_counter() - start) / 1e12

    def _broadcast_each(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor, 0)

    def _broadcast_packed(self, tensors: list[torch.Tensor]) -> None:
        buffer = torch.empty(PACKED_BYTES, dtype=torch.uint8, device=self._place)
        batch: list[torch.Tensor] = []
        used = 0
        for tensor in [*tensors, None]:
            if batch and (tensor is None or used + tensor.nbytes > PACKED_BYTES):
                parts = list(buffer[:used].split([t.nbytes for t in batch]))
                flat = [t.view(torch.uint8) for t in batch]
                if dist.get_rank() == 0:
                    torch._foreach_copy_(parts, flat)
                dist.broadcast(buffer[:used], 0)
                if dist.get_rank() != 0:
                    torch._foreach_copy_(flat, parts)
                batch, used = [], 0
            if tensor is not None:
                batch.append(tensor)
                used += tensor.nbytes

    def _layout_here(self) -> transfuse.Layout:
        assert self._layout is not None
        return self._layout

    def _views(self) -> dict[str, torch.Tensor]:
        sizes: dict[str, int] = {}
        begins = {}
        for spec in self._layout_here().parameters:
            dtype = spec.dtype.name
            begins[spec.name] = sizes.get(dtype, 0)
            step = ALIGNMENT_BYTES // DTYPES[dtype].itemsize
            sizes[dtype] = begins[spec.name] + -(-spec.element_count // step) * step
        buffers = {
            dtype: torch.zeros(count, dtype=DTYPES[dtype], device=self._place)
            for dtype, count in sizes.items()
        }
        return {
            spec.name: buffers[spec.dtype.name].narrow(0, begins[spec.name], spec.element_count)
            for spec in self._layout_here().parameters
        }

    def _in_an_arena(self) -> dict[str, torch.Tensor]:
        specs = self._layout_here().parameters
        sizes = [p.element_count * DTYPES[p.dtype.name].itemsize for p in specs]
        space = transfuse.Arena(sum(map(aligned, sizes)), job=self._job)
        return {p.name: space.tensor((p.element_count,), DTYPES[p.dtype.name]) for p in specs}

    def _tiles(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every box that is held, as a view of the parameters, with its values."""
        layout = self._layout_here()
        names = [p.name for p in layout.parameters]
        catalog = layout.tensors
        # A GPU makes them also of what lies in the host: both sides make the same ones, and fast.
        maker = self._place
        if maker == "cpu" and torch.cuda.is_available():
            maker = "cuda:0"
        generator = torch.Generator(maker)
        for tile in layout.tiles:
            tensor, box = catalog[tile.tensor], tile.box
            generator.manual_seed(zlib.crc32(f"{tensor.name} {seed}".encode()))
            whole = torch.randn(tensor.shape, generator=generator, device=maker)
            places = zip(box.offset, box.length, strict=True)
            part = whole[tuple(slice(begin, begin + count) for begin, count in places)]
            flat = self._parameters[names[tile.parameter]]
            offset = flat.storage_offset() + tile.element_offset
            yield flat.as_strided(box.length, tile.element_strides, offset), part


def serve(name: str, job: str, commands: Connection) -> None:
    """Obeys until told to end; a failure is an answer."""
    worker = Worker(name, job)
    while True:
        try:
            method, arguments, options = commands.recv()
        except EOFError:
            break
        try:
            commands.send((True, getattr(worker, method)(*arguments, **options)))
        except Exception as error:  # noqa: BLE001  # the one who asked raises it again
            said = traceback.format_exc(limit=3)
            commands.send((False, (type(error).__name__, f"{name}.{method}: {error}", said)))
    worker.free()
