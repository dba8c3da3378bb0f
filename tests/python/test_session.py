"""Publisher and Receiver end to end, through the job's own coordinator and shared memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import transfuse
from transfuse import Dtype, VersionState, hf

NUMPY = pytest.importorskip("numpy")


def module(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32)).to(dtype)


def fill(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()


def same(source, target):
    pairs = zip(source.parameters(), target.parameters(), strict=True)
    return all(torch.equal(a.to(b.dtype), b) for a, b in pairs)


def publisher(model, job, name="trainer0", **options):
    return transfuse.Publisher(*hf.layout(model), name=name, job=job, **options)


def receiver(model, job, name="engine0", **options):
    return transfuse.Receiver(*hf.layout(model), name=name, job=job, **options)


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_every_version_arrives_cast_and_proved(job, held, wanted):
    source, target = module(held), module(wanted, seed=1)
    with publisher(source, job) as trainer, receiver(target, job) as engine:
        for version in (1, 2, 3):
            with trainer.write(version):
                fill(source)
            assert trainer.version == version
            report = engine.refit(exactly=version, timeout_s=30)
            assert same(source, target)
            assert (report.version, engine.version) == (version, version)
            assert report.verified_bytes == report.size_bytes
            assert report.source_bytes * wanted.itemsize == report.size_bytes * held.itemsize
            assert report.planned is (version == 1)
            assert {(r.source, r.route) for r in report.routes} == {
                ("trainer0", "process_vm_readv")
            }
        assert json.loads(report.to_json())["version"] == 3


def test_memory_of_an_arena_is_mapped_not_copied_out(job):
    source, target = module(), module(seed=1)
    before = [p.detach().clone() for p in source.parameters()]
    arena = hf.move_to_arena(source, job=job)
    assert all(torch.equal(a, b) for a, b in zip(before, source.parameters(), strict=True))
    assert len(memoryview(arena)) == arena.size_bytes
    with publisher(source, job) as trainer, receiver(target, job) as engine:
        with trainer.write(1):
            fill(source)
        report = engine.refit(timeout_s=30)
        assert {route.route for route in report.routes} == {"memfd"}
        assert same(source, target)


def test_an_arena_that_is_used_up_says_so():
    arena = transfuse.Arena(4096)
    arena.tensor((1000,), torch.float32)
    with pytest.raises(transfuse.ResourceExhaustedError, match="4096"):
        arena.tensor((100,), torch.float32)


class OnlyDlpack:
    """An array of no known library."""

    def __init__(self, tensor):
        self._tensor = tensor

    def __dlpack__(self, **options):
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()


def vector_layout(count=100):
    builder = transfuse.LayoutBuilder()
    tensor = builder.tensor("w", Dtype.F32, (count,))
    builder.tile(tensor, transfuse.Box.whole((count,)), builder.parameter("w", Dtype.F32, count))
    return builder.build()


def test_tensors_arrays_and_buffers_are_memory(job):
    layout, values = vector_layout(), torch.arange(100.0)
    targets = {
        "tensor": torch.zeros(100),
        "numpy": NUMPY.zeros(100, dtype=NUMPY.float32),
        "bytearray": bytearray(400),
        "dlpack": torch.zeros(100),
    }
    with transfuse.Publisher(layout, {"w": values.numpy()}, name="trainer0", job=job) as trainer:
        with trainer.write(1):
            pass
        for kind, memory in targets.items():
            given = OnlyDlpack(memory) if kind == "dlpack" else memory
            with transfuse.Receiver(layout, {"w": given}, name=kind, job=job) as engine:
                engine.refit(timeout_s=30)
            assert bytes(NUMPY.asarray(memory)) == values.numpy().tobytes(), kind


BAD = {
    "no memory": (5, transfuse.InvalidArgumentError, "int"),
    "dtype": (torch.zeros(100, dtype=torch.int32), transfuse.LayoutMismatchError, "int32"),
    "too small": (torch.zeros(99), transfuse.LayoutMismatchError, "400.*396"),
    "strided": (torch.zeros(200)[::2], transfuse.InvalidArgumentError, "not contiguous"),
    "read-only": (b"x" * 400, transfuse.InvalidArgumentError, "writable"),
    "device": (torch.zeros(100, device="meta"), transfuse.UnsupportedError, "meta"),
    "array dtype": (
        OnlyDlpack(torch.zeros(100, dtype=torch.bfloat16)),
        transfuse.LayoutMismatchError,
        "bfloat16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_memory_that_does_not_fit_is_refused_by_parameter(job, case):
    memory, error, message = BAD[case]
    with pytest.raises(error, match=message):
        transfuse.Receiver(vector_layout(), {"w": memory}, name="engine0", job=job)


def test_I2_parameters_are_matched_by_name(job):
    memory = {"v": torch.zeros(100)}
    with pytest.raises(transfuse.InvalidArgumentError, match="'v'"):
        transfuse.Receiver(vector_layout(), memory, name="engine0", job=job)
    with pytest.raises(transfuse.InvalidArgumentError, match="'w'"):
        transfuse.Receiver(vector_layout(), {}, name="engine0", job=job)


def test_a_version_that_never_comes_ends_at_the_deadline(job):
    with publisher(module(), job), receiver(module(), job) as engine:
        start = time.monotonic()
        with pytest.raises(transfuse.DeadlineExceededError):
            engine.refit(exactly=7, timeout_s=0.5)
        assert time.monotonic() - start >= 0.5
        assert engine.version == 0


def test_an_exception_while_writing_aborts_the_version(job):
    source = module()
    with publisher(source, job) as trainer:
        with trainer.write(1):
            pass
        with pytest.raises(ZeroDivisionError), trainer.write(2):
            raise ZeroDivisionError
        assert trainer.version == 0
        states = {v.version: v.state for v in transfuse.Control(job=job).versions("model")}
        assert states[2] is VersionState.ABORTED
        with trainer.write(3):
            pass
        assert trainer.version == 3


def test_two_live_publishers_of_one_name_are_refused(job):
    with publisher(module(), job), pytest.raises(transfuse.AlreadyExistsError, match="trainer0"):
        publisher(module(), job)


def test_a_closed_member_says_so_and_closes_twice(job):
    trainer = publisher(module(), job)
    trainer.close()
    trainer.close()
    with pytest.raises(transfuse.UnavailableError, match="trainer0"):
        trainer.begin_write(1)


def test_one_process_has_one_set_of_options_for_a_job(job):
    with publisher(module(), job, threads=1):
        with pytest.raises(transfuse.InvalidArgumentError, match="threads"):
            receiver(module(), job, threads=2)
        receiver(module(), job).close()


def test_control_sees_members_and_versions_and_verifies(job):
    source, target = module(), module(seed=1)
    control = transfuse.Control(job=job)
    with publisher(source, job) as trainer, receiver(target, job) as engine:
        with trainer.write(1):
            pass
        engine.refit(timeout_s=30)
        members = {member.name: member for member in control.members("model")}
        assert members["trainer0"].layout == hf.layout(source)[0].digest
        assert members["engine0"].version == 1
        assert [v.state for v in control.versions("model")] == [VersionState.READY]
        assert control.verify("model", timeout_s=30).matches
        with torch.no_grad():
            target[0].weight[3, 5] += 1.0
        verdict = control.verify("model", timeout_s=30)
        assert not verdict.matches
        assert [m.tensor for m in verdict.targets[0].mismatches] == ["0.weight"]


def test_watch_tells_of_a_version_and_ends_when_nothing_happens(job):
    with publisher(module(), job) as trainer:
        changes = transfuse.Control(job=job).watch("model", timeout_s=5)
        with trainer.write(1):
            pass
        assert any(change.state is VersionState.READY for change in changes)
        assert list(transfuse.Control(job=job).watch("other", timeout_s=0.2)) == []


def test_cancel_ends_a_refit_that_waits(job):
    with receiver(module(), job) as engine:
        threading.Timer(0.3, engine.cancel).start()
        with pytest.raises(transfuse.CancelledError):
            engine.refit(timeout_s=60)


def test_ctrl_c_ends_a_refit_that_waits(job):
    with receiver(module(), job) as engine:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            engine.refit(timeout_s=120)
        assert time.monotonic() - start < 60


def test_the_gil_is_free_while_a_refit_waits(job):
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.wait(0.01):
            ticks.append(time.monotonic())

    with receiver(module(), job) as engine:
        thread = threading.Thread(target=tick)
        thread.start()
        with pytest.raises(transfuse.DeadlineExceededError):
            engine.refit(timeout_s=1.0)
        stop.set()
        thread.join()
    assert len(ticks) > 3


def test_a_forked_child_leaves_its_parents_publisher_alone(job):
    source, target = module(), module(seed=1)
    with publisher(source, job) as trainer, receiver(target, job) as engine:
        with trainer.write(1):
            pass
        child = os.fork()
        if child == 0:
            try:
                trainer.begin_write(2)
            except transfuse.UnavailableError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        engine.refit(exactly=1, timeout_s=30)
        assert same(source, target)


TRAINER_TO_ENGINE = """
import sys, torch, transfuse
from transfuse import hf
torch.manual_seed(int(sys.argv[2]))
model = torch.nn.Linear(300, 200)
if sys.argv[1] == "trainer":
    publisher = transfuse.Publisher(*hf.layout(model), name="t", job=sys.argv[3],
                                    allow_any_tracer=True)
    with publisher.write(1):
        pass
    print(float(model.weight.sum()), flush=True)
    sys.stdin.read()
else:
    receiver = transfuse.Receiver(*hf.layout(model), name="e", job=sys.argv[3])
    receiver.refit(timeout_s=60)
    print(float(model.weight.sum()), flush=True)
"""


def test_two_processes_need_no_more_than_a_job_name(job):
    def start(role, seed):
        command = [sys.executable, "-c", TRAINER_TO_ENGINE, role, str(seed), job]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    trainer, engine = start("trainer", 1), start("engine", 2)
    try:
        out, _ = engine.communicate(timeout=120)
        assert engine.returncode == 0
        expected, _ = trainer.communicate(timeout=60)
        assert trainer.returncode == 0
        assert out == expected
    finally:
        for process in (trainer, engine):
            process.kill()
            process.communicate()


def test_the_coordinator_of_a_job_is_found_where_one_runs(job):
    with pytest.raises(transfuse.NotFoundError):
        transfuse.find_coordinator(job)
    with publisher(module(), job):
        info = transfuse.find_coordinator(job)
        assert os.path.exists(f"/proc/{info.pid}")
        assert info.epoch >= 1
