"""Publishers and receivers on memory of GPUs, between real processes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time

import live_training
import pytest
import torch
import transfuse
from commanded import Commanded, FailedError
from gpu_worker import CONFIG, layouts_of, queue_late_writes, values, zeros
from transfuse import _device, hf
from transfuse.engine import Architecture, Engine, Request, Weights
from transfuse.guard import PointerGuard, PointerMovedError

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU, or torch is built without CUDA"
)

HERE = "cuda:0"
MIB = 1 << 20


def source_of(job, spec, rank, count, place, *, elements=0, env=None, **publisher):
    """A publisher in a process of its own."""
    options = {
        "job": job,
        "spec": spec,
        "rank": rank,
        "source_count": count,
        "place": place,
        "elements": elements,
        "publisher": publisher,
    }
    return Commanded("gpu_worker.py", options, env=env)


@pytest.fixture
def sources(job):
    """Starts the sources of a spec; all are gone when the test ends."""
    running = []

    def start(spec="hf", place=HERE, **options):
        count = len(layouts_of(spec, options.get("elements", 0)))
        started = [source_of(job, spec, rank, count, place, **options) for rank in range(count)]
        running.extend(started)
        for source in started:
            source.said()
        return started

    yield start
    for source in running:
        with contextlib.suppress(BrokenPipeError):
            source.end()


def publish(started, version):
    for source in started:
        source.send("publish", version=version)
    return [source.said() for source in started]


def same(parameters, wanted):
    return all(torch.equal(parameters[name].cpu(), wanted[name]) for name in wanted)


def other_gpu():
    return f"cuda:{torch.cuda.device_count() - 1}"


BEHIND = {
    "retention": "snapshot",
    "snapshot_place": "host",
    "snapshot_async": True,
    "snapshot_gigabytes_per_second": 2.0,
}
PLACES = {
    "one GPU": (HERE, HERE, {}),
    "two GPUs": ("last", HERE, {}),
    "host to GPU": ("cpu", HERE, {}),
    "host with a device to GPU": ("cpu", HERE, {"device": HERE}),
    "GPU to host": (HERE, "cpu", {}),
    "snapshots in the host": (HERE, HERE, {"retention": "snapshot", "snapshot_place": "host"}),
    "behind the trainer": (HERE, HERE, {"retention": "snapshot", "snapshot_async": True}),
    "into the host behind the trainer": (HERE, HERE, BEHIND),
}


@pytest.mark.parametrize("case", PLACES)
def test_every_version_arrives_and_is_proved(job, sources, case):
    source_place, target_place, options = PLACES[case]
    if source_place == "last":
        source_place = other_gpu()
        if source_place == HERE:
            pytest.skip("one GPU")
    started = sources(place=source_place, **options)
    layout = layouts_of("hf")[0]
    parameters = zeros(layout, target_place)
    with transfuse.Receiver(layout, parameters, name="engine0", job=job, device=HERE) as engine:
        assert engine.device == 0
        for version in (1, 2, 3):
            publish(started, version)
            report = engine.refit(exactly=version, timeout_s=60)
            assert report.verified_bytes == report.size_bytes > 0
            assert report.planned is (version == 1)
            assert same(parameters, values(layout, version))
        assert transfuse.Control(job=job).verify("model", timeout_s=60).matches
        sys.stdout.write(f"{case}: {sorted({r.route for r in report.routes})}\n")


PAIRS = [
    ("fsdp:dp=2", "vllm:tp=1"),
    ("fsdp:dp=2", "vllm:tp=2"),
    ("fsdp:dp=2,dtype=f32", "vllm:tp=2"),
    ("megatron:tp=2", "vllm:tp=1"),
    ("megatron:tp=2", "vllm:tp=4"),
    ("megatron:tp=4", "vllm:tp=2"),
    ("megatron:tp=2,pp=2", "hf"),
    ("vllm:tp=1", "vllm:tp=2"),
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_layouts_change_on_the_way(job, sources, source, target):
    publish(sources(source, other_gpu()), 1)
    for rank, layout in enumerate(layouts_of(target)):
        parameters = zeros(layout, HERE)
        with transfuse.Receiver(layout, parameters, name=f"engine{rank}", job=job) as engine:
            report = engine.refit(timeout_s=60)
            assert report.verified_bytes == report.size_bytes > 0
            assert same(parameters, values(layout, 1)), f"rank {rank}"


@pytest.mark.parametrize("retention", ["in_place", "snapshot"])
@pytest.mark.parametrize("into", ["in_place", "shadow"])
def test_every_way_of_keeping_and_receiving(job, sources, retention, into):
    started = sources("fsdp:dp=2", retention=retention)
    layout = layouts_of("vllm:tp=2")[1]
    parameters = zeros(layout, HERE)
    with transfuse.Receiver(layout, parameters, name="engine0", job=job, into=into) as engine:
        for version in (1, 2, 3, 4):
            publish(started, version)
            if retention == "snapshot":
                for source in started:
                    source.does("scribble")
            engine.refit(exactly=version, timeout_s=60)
            assert same(parameters, values(layout, version))


@pytest.mark.parametrize("place", ["with_weights", "host"])
@pytest.mark.parametrize("source", ["hf", "megatron:tp=2", "fsdp:dp=2,dtype=f32"])
def test_the_copy_of_a_snapshot_makes_the_sums_of_readers_that_are_known(
    job, sources, source, place
):
    started = sources(source, retention="snapshot", snapshot_place=place)
    with contextlib.ExitStack() as open_engines:
        engines = []
        for rank, layout in enumerate(layouts_of("vllm:tp=2")):
            parameters = zeros(layout, HERE)
            engine = transfuse.Receiver(layout, parameters, name=f"engine{rank}", job=job)
            engines.append((layout, parameters, open_engines.enter_context(engine)))
        for version in (1, 2, 3, 4):
            publish(started, version)
            for layout, parameters, engine in engines:
                report = engine.refit(exactly=version, timeout_s=60)
                assert report.verified_bytes == report.size_bytes > 0
                assert not report.steps
                assert same(parameters, values(layout, version))


def test_a_step_waits_for_the_copy_behind_the_trainer_and_readers_get_what_was_published(
    job, sources
):
    elements = 64 * MIB  # 128 MiB: 64 ms
    (source,) = sources(elements=elements, **BEHIND)
    layout = layouts_of("", elements)[0]
    parameters = zeros(layout, HERE)
    with transfuse.Receiver(layout, parameters, name="engine0", job=job) as engine:
        for version in (1, 3):
            source.does("publish", version=version)
            waited = source.does("spoil", version=version + 1)
            assert waited["copy_waited_us"] > 0
            engine.refit(exactly=version, timeout_s=60)
            assert same(parameters, values(layout, version))


def test_parameters_change_in_the_commit_and_come_back_by_a_rollback(job, sources):
    started = sources("fsdp:dp=2")
    layout = layouts_of("hf")[0]
    parameters = zeros(layout, HERE)
    first, second = (values(layout, version) for version in (1, 2))
    with transfuse.Receiver(
        layout, parameters, name="engine0", job=job, into="shadow", keep_previous=True
    ) as engine:
        publish(started, 1)
        engine.refit(timeout_s=60)
        publish(started, 2)
        engine.stage(exactly=2, timeout_s=60).wait(60)
        assert same(parameters, first)
        report = engine.commit(timeout_s=60)
        assert report.phases.commit_us > 0
        assert same(parameters, second)
        assert engine.rollback() == 1
        assert same(parameters, first)


def test_what_is_queued_on_the_current_stream_is_published(job, sources):
    (source,) = sources()
    layout = layouts_of("hf")[0]
    parameters = zeros(layout, HERE)
    with transfuse.Receiver(layout, parameters, name="engine0", job=job) as engine:
        publish([source], 1)
        engine.refit(timeout_s=60)
        late = source.does("publish_late", version=2)
        assert late["queued"], "the writes had ended before publish() was called"
        engine.refit(exactly=2, timeout_s=60)
        assert same(parameters, values(layout, 2))


@pytest.mark.parametrize("into", ["in_place", "shadow"])
def test_what_is_queued_on_the_current_stream_does_not_overwrite_a_refit(job, sources, into):
    (source,) = sources()
    layout = layouts_of("hf")[0]
    parameters = zeros(layout, HERE)
    with transfuse.Receiver(layout, parameters, name="engine0", job=job, into=into) as engine:
        publish([source], 1)
        stream = torch.cuda.Stream()
        queue_late_writes(parameters, values(layout, 5), stream)
        with torch.cuda.stream(stream):
            assert not stream.query()
            engine.refit(timeout_s=60)
            held = {name: tensor.clone() for name, tensor in parameters.items()}
        torch.cuda.synchronize()
        wanted = values(layout, 1)
        assert same(held, wanted)
        assert same(parameters, wanted)


def free_bytes():
    torch.cuda.synchronize()
    return [torch.cuda.mem_get_info(n)[0] for n in range(torch.cuda.device_count())]


@pytest.mark.parametrize("retention", ["in_place", "snapshot"])
@pytest.mark.parametrize("into", ["in_place", "shadow"])
def test_T11_memory_of_the_devices_is_flat_over_100_cycles(job, sources, retention, into):
    started = sources("fsdp:dp=2", other_gpu(), retention=retention)
    layout = layouts_of("vllm:tp=2")[0]
    parameters = zeros(layout, HERE)
    free = {}
    with transfuse.Receiver(layout, parameters, name="engine0", job=job, into=into) as engine:
        for version in range(1, 101):
            publish(started, version)
            engine.refit(exactly=version, timeout_s=60)
            free[version] = free_bytes()
    # The driver takes memory by 2 MiB: a leak of 45 KiB a cycle is two of them.
    lost = [before - after for before, after in zip(free[10], free[100], strict=True)]
    assert max(lost) < 4 * MIB, f"bytes lost by device between cycles 10 and 100: {lost}"


def test_a_receiver_gives_back_what_it_took(job, sources):
    started = sources()
    publish(started, 1)
    layout = layouts_of("hf")[0]
    parameters = zeros(layout, HERE)
    free = []
    for attempt in range(12):
        with transfuse.Receiver(
            layout, parameters, name=f"e{attempt}", job=job, into="shadow"
        ) as engine:
            engine.refit(timeout_s=60)
        free.append(free_bytes())
    lost = [before - after for before, after in zip(free[1], free[-1], strict=True)]
    assert max(lost) < 4 * MIB, f"bytes lost by device over ten receivers: {lost}"


def test_a_source_killed_midway_leaves_a_whole_version(job, sources):
    elements = 32 * MIB  # 64 MiB
    (source,) = sources(elements=elements, place=other_gpu())
    layout = layouts_of("", elements)[0]
    parameters = zeros(layout, HERE)
    with transfuse.Receiver(
        layout, parameters, name="engine0", job=job, into="shadow", no_progress_s=1.0
    ) as engine:
        publish([source], 1)
        engine.refit(timeout_s=60)
        first = parameters["w"].clone()
        publish([source], 2)
        stage = engine.stage(exactly=2, timeout_s=8, max_gigabytes_per_second=0.01)
        time.sleep(0.5)
        assert stage.progress.state == transfuse.StageState.MOVING
        source.process.kill()
        source.process.wait()
        # What is mapped here stays readable: version 2 may still arrive and be proved, or not.
        try:
            stage.wait(60)
        except (
            transfuse.VersionGoneError,
            transfuse.UnavailableError,
            transfuse.NoFittingSourceError,
            transfuse.DeadlineExceededError,
        ) as failure:
            sys.stdout.write(f"killed midway: {type(failure).__name__}: {failure}\n")
        else:
            engine.commit()
            assert engine.version == 2
            assert same(parameters, values(layout, 2))
        if engine.version == 1:
            assert torch.equal(parameters["w"], first)
        (another,) = sources(elements=elements, place=other_gpu())
        publish([another], 3)
        engine.refit(exactly=3, timeout_s=60)
        assert same(parameters, values(layout, 3))


@contextlib.contextmanager
def little_memory(left_bytes):
    """Nearly all memory of the GPU here is taken."""
    torch.cuda.empty_cache()
    held = []
    size = torch.cuda.mem_get_info(0)[0] - left_bytes
    while size > 4 * MIB:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device=HERE))
        except torch.OutOfMemoryError:
            size //= 2
            continue
        size = torch.cuda.mem_get_info(0)[0] - left_bytes
    try:
        yield
    finally:
        held.clear()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("side", ["snapshot", "shadow"])
def test_no_room_on_the_device_is_an_error_that_says_how_much(job, side):
    elements = 256 * MIB  # 512 MiB
    layout = layouts_of("", elements)[0]
    parameters = zeros(layout, HERE)

    def open_member():
        if side == "snapshot":
            return transfuse.Publisher(
                layout, parameters, name="trainer0", job=job, retention="snapshot"
            )
        return transfuse.Receiver(layout, parameters, name="engine0", job=job, into="shadow")

    with transfuse.Receiver(layout, parameters, name="first", job=job):
        pass  # the driver has taken its own
    with little_memory(300 * MIB):
        with pytest.raises(transfuse.ResourceExhaustedError, match=r"53687\d{4} bytes"):
            open_member()
    with open_member():
        pass


def test_an_arena_of_the_device_is_memory_of_both_ends(job, sources):
    layout = layouts_of("hf")[0]
    wanted = values(layout, 1)
    size_bytes = sum(-(-t.nbytes // 256) * 256 for t in wanted.values())
    arenas = [transfuse.Arena(size_bytes, job=job, device=HERE) for _ in range(2)]
    held, parameters = (
        {name: arena.tensor(t.shape, t.dtype) for name, t in wanted.items()} for arena in arenas
    )
    assert arenas[0].device == 0
    assert all(tensor.is_cuda and not tensor.any() for tensor in held.values())
    with pytest.raises(BufferError, match="GPU"):
        memoryview(arenas[0])
    with pytest.raises(transfuse.ResourceExhaustedError, match=str(size_bytes)):
        arenas[0].tensor((size_bytes,), torch.uint8)
    del arenas  # the tensors keep them
    with (
        transfuse.Publisher(layout, held, name="trainer0", job=job) as trainer,
        transfuse.Receiver(layout, parameters, name="engine0", job=job) as engine,
    ):
        with trainer.write(1):
            for name, tensor in wanted.items():
                held[name].copy_(tensor)
        engine.refit(timeout_s=60)
        assert same(parameters, wanted)


def test_a_module_moves_to_an_arena_of_its_gpu(job):
    module = torch.nn.Linear(64, 32).to(HERE)
    before = [p.detach().clone() for p in module.parameters()]
    arena = hf.move_to_arena(module, job=job)
    assert arena.device == 0
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


class OnlyDlpack:
    """An array of no known library, on a GPU."""

    def __init__(self, tensor):
        self._tensor = tensor

    def __dlpack__(self, **options):
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()


def test_arrays_of_other_libraries_on_a_gpu_are_memory(job):
    layout = layouts_of("", 1000)[0]
    source = values(layout, 1)["w"].to(HERE)
    target = torch.zeros_like(source)
    with (
        transfuse.Publisher(layout, {"w": OnlyDlpack(source)}, name="t", job=job) as trainer,
        transfuse.Receiver(layout, {"w": OnlyDlpack(target)}, name="e", job=job) as engine,
    ):
        assert (trainer.device, engine.device) == (0, 0)
        with trainer.write(1):
            pass
        engine.refit(timeout_s=60)
        assert torch.equal(source, target)


def test_two_gpus_of_one_process_have_sessions_of_their_own(job):
    if other_gpu() == HERE:
        pytest.skip("one GPU")
    layout = layouts_of("", 1000)[0]
    source = values(layout, 1)["w"].to(other_gpu())
    target = torch.zeros(1000, dtype=torch.bfloat16, device=HERE)
    with (
        transfuse.Publisher(layout, {"w": source}, name="t", job=job) as trainer,
        transfuse.Receiver(layout, {"w": target}, name="e", job=job) as engine,
    ):
        assert (trainer.device, engine.device) == (torch.cuda.device_count() - 1, 0)
        with trainer.write(1):
            pass
        engine.refit(timeout_s=60)
        assert torch.equal(source.cpu(), target.cpu())


def test_memory_that_the_allocator_maps_piece_by_piece_is_read(job, sources):
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    started = sources("fsdp:dp=2", other_gpu(), env=env)
    layout = layouts_of("vllm:tp=1")[0]
    parameters = zeros(layout, HERE)
    with transfuse.Receiver(layout, parameters, name="engine0", job=job) as engine:
        for version in (1, 2):
            publish(started, version)
            engine.refit(exactly=version, timeout_s=60)
            assert same(parameters, values(layout, version))


@contextlib.contextmanager
def sleeping_engine(job, into):
    """An engine whose memory sleeps as vLLM's does, in a process of its own."""
    engine = Commanded("sleep_worker.py", {"job": job, "into": into, "place": HERE})
    try:
        engine.said()
        yield engine
        engine.does("leave")
    finally:
        with contextlib.suppress(BrokenPipeError):
            engine.end()


def fall_asleep(engine):
    slept = engine.does("sleep")
    # Others use the device too: a source makes tables meanwhile.
    assert slept["after"] - slept["before"] > slept["size_bytes"] // 2 > 0, slept


@pytest.mark.parametrize("into", ["in_place", "shadow"])
def test_an_engine_sleeps_and_wakes_between_refits(job, sources, into):
    (source,) = sources()
    with sleeping_engine(job, into) as engine:
        for version in (1, 2, 3):
            publish([source], version)
            if version > 1:
                fall_asleep(engine)
                with pytest.raises(FailedError, match="wake|mapped") as asleep:
                    engine.does("refit", version=version)
                assert asleep.value.kind == "UnavailableError"
                assert engine.does("version") == version - 1
                engine.does("wake")
            assert engine.does("refit", version=version) > 0
            assert engine.does("wrong", version=version) == []
        if into == "shadow":  # which lies elsewhere: versions arrive while the engine sleeps
            fall_asleep(engine)
            publish([source], 4)
            engine.does("stage", version=4)
            engine.does("wake")
            assert engine.does("commit") == 4
            assert engine.does("wrong", version=4) == []
        # Its memory cannot be opened by others, but it sums what it holds by itself.
        assert transfuse.Control(job=job).verify("model", timeout_s=60).matches


def test_an_engine_that_sleeps_cannot_be_verified_and_is_none_the_worse(job, sources):
    (source,) = sources()
    with sleeping_engine(job, "in_place") as engine:
        publish([source], 1)
        engine.does("refit", version=1)
        fall_asleep(engine)
        (verdict,) = transfuse.Control(job=job).verify("model", timeout_s=10).targets
        sys.stdout.write(f"asleep: {verdict.not_compared}\n")
        assert verdict.not_compared
        engine.does("wake")
        publish([source], 2)
        engine.does("refit", version=2)
        assert engine.does("wrong", version=2) == []
        assert transfuse.Control(job=job).verify("model", timeout_s=60).matches


def test_a_tensor_that_sleeps_is_refused_and_one_that_is_awake_again_is_taken(job):
    layout = layouts_of("", 1 << 22)[0]
    parameter = zeros(layout, HERE)["w"]
    parameter.untyped_storage().resize_(0)
    with pytest.raises(transfuse.InvalidArgumentError, match="'w'.*sleeps"):
        transfuse.Receiver(layout, {"w": parameter}, name="engine0", job=job)
    parameter.untyped_storage().resize_(2 << 22)
    transfuse.Receiver(layout, {"w": parameter}, name="engine0", job=job).close()


def test_a_parameter_at_another_place_is_found_before_anything_is_written(job, sources):
    (source,) = sources()
    publish([source], 1)
    layout = layouts_of("hf")[0]
    parameters = zeros(layout, HERE)
    receiver = transfuse.Receiver(layout, parameters, name="e", job=job, guard=lambda: parameters)
    with receiver as engine:
        engine.refit(timeout_s=60)
        name = sorted(parameters)[0]
        awake = torch.zeros_like(parameters[name])
        parameters[name] = awake
        publish([source], 2)
        with pytest.raises(PointerMovedError, match="before the refit.*open it anew") as failure:
            engine.refit(exactly=2, timeout_s=60)
        assert failure.value.parameter == name
        assert engine.version == 0
        assert not awake.any()
    with transfuse.Receiver(
        layout, parameters, name="e2", job=job, guard=lambda: parameters
    ) as engine:
        engine.refit(exactly=2, timeout_s=60)
        assert same(parameters, values(layout, 2))


def test_the_guard_sees_memory_of_gpus(job):
    module = torch.nn.Linear(64, 32).to(HERE)
    guard = PointerGuard(module)
    guard.check()
    module.weight.data = module.weight.data.clone()
    with pytest.raises(PointerMovedError, match="weight"):
        guard.check()
    guard.restore()
    guard.check()


@pytest.mark.parametrize("into", ["in_place", "shadow"])
def test_a_captured_graph_computes_with_the_weights_of_every_refit(job, into):
    trained, served = (torch.nn.Linear(64, 32, dtype=torch.bfloat16, device=HERE) for _ in "ts")
    inputs = torch.randn(8, 64, dtype=torch.bfloat16, device=HERE)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(aside):
            served(inputs)  # what a library sets up at its first call is not for the graph
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            outputs = served(inputs)
    layout, source = hf.layout(trained)
    _, target = hf.layout(served)
    with (
        transfuse.Publisher(layout, source, name="t", job=job) as trainer,
        transfuse.Receiver(layout, target, name="e", job=job, into=into, guard=served) as engine,
    ):
        before = None
        for version in (1, 2, 3):
            with trainer.write(version), torch.no_grad():
                for parameter in trained.parameters():
                    parameter.normal_()
            engine.refit(exactly=version, timeout_s=60)
            graph.replay()
            with torch.no_grad():
                torch.testing.assert_close(outputs, trained(inputs))
            assert before is None or not torch.equal(outputs, before)
            before = outputs.clone()
        # The graph goes on reading the old place: the guard does not let this pass.
        served.weight.data = served.weight.data.clone()
        with trainer.write(4), torch.no_grad():
            trained.weight.normal_()
        with pytest.raises(PointerMovedError, match="weight"):
            engine.refit(exactly=4, timeout_s=60)
        graph.replay()
        assert torch.equal(outputs, before)


def test_an_engine_on_two_gpus_follows_fsdp2_trainers_over_nccl(job, tmp_path):
    if torch.cuda.device_count() < live_training.RANKS:
        pytest.skip("one GPU: NCCL has no group of two ranks on it")
    places = [f"cuda:{rank}" for rank in range(live_training.RANKS)]
    found = live_training.train_and_follow(job, tmp_path, "nccl", places)
    sys.stdout.write(f"versions {found['versions']} over {found['routes']}\n")
    live_training.judge(found, "nccl")


def test_devices_of_torch_are_those_of_the_transport():
    assert _device.ordinal_of("cuda") == torch.cuda.current_device()
    assert _device.gpu_of([torch.zeros(1, device=HERE)]) == 0


def test_the_reference_engine_computes_on_a_gpu_what_it_does_on_a_cpu(job):
    architecture = Architecture.parse(json.dumps(CONFIG | {"rms_norm_eps": 1e-6}))
    generator = torch.Generator().manual_seed(1)
    whole = {
        spec.name: torch.randn(spec.shape, generator=generator) / 16
        for spec in transfuse.make_catalog(architecture.model)
    }
    prompts = torch.arange(24).view(2, 12) * 37 % CONFIG["vocab_size"]
    logits, versions = {}, {}
    for device in ("cpu", HERE):
        weights = Weights(architecture, dtype=torch.float32, device=device, job=job)
        weights.load(whole)
        engine = Engine(weights, slots=4, max_tokens=32, version=3)
        logits[device] = engine.logits(prompts)
        requests = [Request(row, 8, temperature=1.0, seed=n) for n, row in enumerate([[1, 2], [3]])]
        versions[device] = engine.generate(requests).versions
    assert not logits[HERE].is_cuda
    torch.testing.assert_close(logits[HERE], logits["cpu"], rtol=1e-3, atol=1e-3)
    assert torch.equal(versions[HERE], versions["cpu"])


def test_a_layout_is_captured_from_a_loader_into_memory_of_a_gpu(job):
    architecture = Architecture.parse(json.dumps(CONFIG | {"rms_norm_eps": 1e-6}))
    options = {"rank": 1, "size": 2, "device": HERE, "job": job}
    captured, formula = (Weights(architecture, captured=c, **options) for c in (True, False))
    assert captured.layout.digest == formula.layout.digest


@pytest.mark.parametrize("kind", [(), ("--pretrain",)], ids=["rl", "pretrain"])
def test_a_demo_runs_on_gpus(tmp_path, kind):
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "transfuse.demo", "--tiny", "--plain", "--device", "cuda"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), *kind], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["device"] == "cuda"
    run = report if kind else report["live"]
    expected = "nccl" if torch.cuda.device_count() >= live_training.RANKS else "gloo"
    assert run["collectives"] == expected
    steps = run["steps"]
    routes = {route for row in steps for route in (row.get("refit") or row).get("routes", [])}
    assert routes
    assert not routes & {"memfd", "process_vm_readv"}
