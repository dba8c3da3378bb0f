"""Devices of publishers and receivers, as far as that needs no GPU."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
import transfuse
from transfuse import _device, hf
from transfuse.demo import devices
from transfuse.errors import InvalidArgumentError, UnsupportedError

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


class FakeStorage:
    """What is asked of a storage."""

    def __init__(self, size_bytes):
        self._size_bytes = size_bytes

    def nbytes(self):
        return self._size_bytes


class FakeTensor:
    """The protocol of a tensor, wherever it says that it lies."""

    dtype = "torch.float32"

    def __init__(self, device, *, count=100, storage_bytes=None):
        self.device = device
        self._memory = torch.zeros(count)
        self._storage_bytes = 4 * count if storage_bytes is None else storage_bytes

    def data_ptr(self):
        return self._memory.data_ptr()

    def numel(self):
        return self._memory.numel()

    def element_size(self):
        return 4

    def is_contiguous(self):
        return True

    def storage_offset(self):
        return 0

    def untyped_storage(self):
        return FakeStorage(self._storage_bytes)


def layout(*names):
    builder = transfuse.LayoutBuilder()
    for name in names:
        tensor = builder.tensor(name, transfuse.Dtype.F32, (100,))
        parameter = builder.parameter(name, transfuse.Dtype.F32, 100)
        builder.tile(tensor, transfuse.Box.whole((100,)), parameter)
    return builder.build()


def receiver(job, device=None, **parameters):
    return transfuse.Receiver(
        layout(*parameters), parameters, name="engine0", job=job, device=device
    )


@pytest.mark.parametrize("device", ["xpu:0", "mps", "hpu:1", "cudax:0", "cuda:", "cuda:1x", "meta"])
def test_other_devices_are_refused_by_name(job, device):
    with pytest.raises(UnsupportedError, match=f"'w'.*lies on {device}; expected"):
        receiver(job, w=FakeTensor(device))


def test_parameters_on_two_gpus_are_refused_with_both_names(job):
    message = "'v'.*cuda:1.*'a'.*cuda:0|'a'.*cuda:0.*'v'.*cuda:1"
    with pytest.raises(InvalidArgumentError, match=message):
        receiver(job, a=FakeTensor("cuda:0"), v=FakeTensor("cuda:1"), w=FakeTensor("cpu"))


def test_a_device_that_is_not_that_of_the_parameters_is_refused(job):
    with pytest.raises(InvalidArgumentError, match="'w' lies on cuda:1.*cuda:0"):
        receiver(job, device=0, w=FakeTensor("cuda:1"))


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_memory_that_was_freed_under_a_tensor_is_refused(job, device):
    with pytest.raises(InvalidArgumentError, match="'w'.*400 bytes.*storage.*freed"):
        receiver(job, w=FakeTensor(device, storage_bytes=0))


def test_a_tensor_of_torch_whose_storage_was_freed_is_refused(job):
    asleep = torch.zeros(100)
    asleep.untyped_storage().resize_(0)
    with pytest.raises(InvalidArgumentError, match="'w'.*sleeps"):
        receiver(job, w=asleep)


def test_a_revision_of_memory_of_a_gpu_is_refused_with_the_remedy():
    with pytest.raises(UnsupportedError, match="'w' lies on cuda:0.*compute_revision"):
        transfuse.revision(layout("w"), {"w": FakeTensor("cuda:0")})
    assert transfuse.revision(layout("w"), {"w": FakeTensor("cpu")})


@WITHOUT_GPU
@pytest.mark.parametrize(
    ("device", "parameter"),
    [(None, "cuda:0"), ("cuda:0", "cuda:0"), (0, "cpu"), (torch.device("cuda", 0), "cpu")],
)
def test_a_gpu_that_is_not_there_is_named_with_the_reason(job, device, parameter):
    with pytest.raises(UnsupportedError, match="cuda:0: (this build|no NVIDIA driver|.*device)"):
        receiver(job, device=device, w=FakeTensor(parameter))


@WITHOUT_GPU
def test_a_session_of_a_gpu_is_not_that_of_the_host(job):
    with receiver(job, w=torch.zeros(100)) as engine:
        assert engine.device is None
        with pytest.raises(UnsupportedError, match="cuda:0"):  # not the session that is open
            transfuse.Arena(4096, job=job, device="cuda:0")
        transfuse.Arena(4096, job=job)


def test_an_arena_of_the_host_is_a_buffer_and_no_memory_of_a_gpu():
    arena = transfuse.Arena(4096)
    assert arena.device is None
    assert len(memoryview(arena)) == 4096
    assert not hasattr(arena, "__cuda_array_interface__")


@pytest.mark.parametrize(
    ("device", "ordinal"),
    [(None, None), (0, 0), (3, 3), ("cuda:2", 2), (torch.device("cuda:1"), 1), ("cuda", 0)],
)
def test_devices_are_named_as_torch_names_them(device, ordinal):
    assert _device.ordinal_of(device) == ordinal


@pytest.mark.parametrize("device", [-1, "cpu", "xpu:0", "cuda:-1", "0", torch.device("cpu")])
def test_what_is_no_gpu_is_refused(device):
    with pytest.raises(InvalidArgumentError, match="device: expected a GPU"):
        _device.ordinal_of(device)


def test_tensors_of_two_devices_have_no_arena_together():
    assert _device.gpu_of([torch.zeros(1), torch.zeros(1)]) is None
    with pytest.raises(InvalidArgumentError, match="cpu and meta"):
        _device.gpu_of([torch.zeros(1), torch.zeros(1, device="meta")])


class Streams:
    """torch, as far as it is asked about streams."""

    def __init__(self):
        self.waited = []
        self.cuda = self

    def is_initialized(self):
        return True

    def current_device(self):
        return 1

    def current_stream(self, device):
        return types.SimpleNamespace(synchronize=lambda: self.waited.append(device))


@pytest.fixture
def streams(monkeypatch):
    found = Streams()
    monkeypatch.setitem(sys.modules, "torch", found)
    return found


def test_the_current_stream_of_a_gpu_is_waited_for(streams):
    _device.finish_queued_work(1)
    assert streams.waited == [1]
    assert _device.ordinal_of("cuda") == 1


def test_a_gpu_that_torch_has_not_used_is_not_opened_by_waiting(streams, monkeypatch):
    monkeypatch.setattr(streams, "is_initialized", lambda: False)
    _device.finish_queued_work(0)
    assert streams.waited == []


def test_streams_are_waited_for_before_reads_and_writes_of_a_device(job, monkeypatch):
    calls = []
    monkeypatch.setattr(transfuse.session, "finish_queued_work", calls.append)
    source, target = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    with transfuse.Publisher(*hf.layout(source), name="trainer0", job=job) as trainer:
        with trainer.write(1):
            pass
        assert calls == [None]  # the host: nothing to wait for
        monkeypatch.setattr(trainer, "_device", 0)
        with trainer.write(2):
            assert calls == [None]
        assert calls == [None, 0]
        with transfuse.Receiver(
            *hf.layout(target), name="e", job=job, into="shadow", keep_previous=True
        ) as engine:
            monkeypatch.setattr(engine, "_device", 1)
            engine.refit(timeout_s=30)
            with trainer.write(3):
                pass
            engine.stage(timeout_s=30).wait(30)
            assert calls == [None, 0, 1, 0]  # not for the shadow
            engine.commit(timeout_s=30)
            engine.rollback()
            assert calls == [None, 0, 1, 0, 1, 1]


@WITHOUT_GPU
@pytest.mark.parametrize("kind", [(), ("--pretrain",)])
def test_a_demo_on_gpus_says_in_one_line_that_there_is_none(tmp_path, kind):
    command = [sys.executable, "-m", "transfuse.demo", "--device", "cuda", "--out", tmp_path, *kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "pip install" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "no CUDA device: torch" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_models_of_a_demo_are_dealt_to_the_gpus_in_turn(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    found = [devices.device_of("cuda", number) for number in range(4)]
    assert [str(device) for device in found] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert chosen == found
    assert devices.device_of("cpu", 3) == torch.device("cpu")


def test_without_a_device_torch_is_neither_imported_nor_asked(job):
    script = f"""
import sys, transfuse
builder = transfuse.LayoutBuilder()
tensor = builder.tensor("w", transfuse.Dtype.F32, (4,))
builder.tile(tensor, transfuse.Box.whole((4,)), builder.parameter("w", transfuse.Dtype.F32, 4))
layout, source, target = builder.build(), bytearray(b"x" * 16), bytearray(16)
with transfuse.Publisher(layout, {{"w": source}}, name="t", job={job!r}) as trainer:
    with trainer.write(1):
        pass
    with transfuse.Receiver(layout, {{"w": target}}, name="e", job={job!r}) as engine:
        engine.refit(timeout_s=30)
assert source == target
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("kind", "gpus", "chosen", "words"),
    [
        ("cpu", 0, "gloo", "over gloo"),
        ("cpu", 8, "gloo", "over gloo"),
        ("cuda", 1, "gloo", "over gloo, since NCCL has no group with two ranks on one GPU"),
        ("cuda", 2, "nccl", "over NCCL, on a GPU each"),
        ("cuda", 8, "nccl", "over NCCL, on a GPU each"),
    ],
)
def test_trainers_of_a_demo_use_nccl_where_each_has_a_gpu(kind, gpus, chosen, words):
    assert devices.choose_collectives(kind, ranks=2, gpus=gpus) == chosen
    assert devices.in_words(kind, chosen) == words
    named = devices.BACKENDS[kind, chosen]
    assert named == ("gloo" if kind == "cpu" else f"cpu:gloo,cuda:{chosen}")
