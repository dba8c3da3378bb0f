"""What receivers demand of sources: kinds, metadata, revisions; replicas are real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transfuse
from replica_worker import model
from transfuse import PRESENT, AtLeast, Dtype, ErrorCode, hf

WORKER = Path(__file__).with_name("replica_worker.py")


class Replica:
    """A process that publishes when it is told to."""

    def __init__(self, job, name, **options):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), job, name, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self):
        said = self._process.stdout.readline()
        assert said, f"{self.name} ended with {self._process.wait(30)}"
        return json.loads(said)

    def order(self, version, **order):
        self._process.stdin.write(json.dumps({"version": version, **order}) + "\n")
        self._process.stdin.flush()

    def end(self):
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()


@pytest.fixture
def replicas(job):
    """replicas(a={options}, b={options}) starts one process each."""
    started = []

    def start(**options):
        started.extend(Replica(job, name, **each) for name, each in options.items())
        assert [each.line() for each in started] == ["ready"] * len(started)
        return started

    yield start
    for each in started:
        each.end()


def publish(replicas, version, **order):
    for each in replicas:
        each.order(version, **order)
    return [each.line() for each in replicas]


def receiver(job, weights, **options):
    return transfuse.Receiver(*hf.layout(weights), name="engine0", job=job, **options)


def expected(version):
    weights = model()
    torch.manual_seed(version)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.normal_()
    return weights


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def ask(*arguments):
    return subprocess.run(["transfuse", *arguments], capture_output=True, text=True, timeout=60)


def test_of_two_replicas_only_the_one_that_fits_is_read_and_all_is_shown(job, replicas):
    both = replicas(
        raw={"kind": "hf_raw", "metadata": {"run": "x"}, "compute_revision": True},
        packed={"kind": "cutlass_fp8", "compute_revision": True},
    )
    weights = model()
    with receiver(job, weights, kinds=["hf_raw"], require={"step": AtLeast(10)}) as engine:
        for version in (1, 2):
            revisions = publish(both, version, metadata={"step": version * 10})
            report = engine.refit(exactly=version, timeout_s=30)
            assert same(weights, expected(version))
            assert [route.source for route in report.routes] == ["raw"]
            (step,) = report.steps
            assert (step.code, step.source) == (ErrorCode.NO_FITTING_SOURCE, "packed")
            assert "its kind is 'cutlass_fp8', accepted: hf_raw" in step.what
            assert report.metadata == {"run": "x", "step": str(version * 10)}
            assert [str(report.revision)] * 2 == revisions
            assert report.planned is (version == 1)
        with pytest.raises(transfuse.NoFittingSourceError, match="'step' is '20', at least 30"):
            engine.refit(require={"step": AtLeast(30)}, timeout_s=0.5)

        status = json.loads(ask("status", "--job", job, "--json").stdout)["models"]["model"]
        assert {each["name"]: each["kind"] for each in status["sources"]} == {
            "raw": "hf_raw",
            "packed": "cutlass_fp8",
        }
        assert status["sources"][1]["metadata"] == {"run": "x"}
        versions = json.loads(ask("versions", "--job", job, "--json").stdout)
        assert versions[-1]["revision"] == revisions[0]
        assert versions[-1]["metadata"] == {"step": "20"}
        story = ask("why", "2", "--job", job).stdout
        assert "not from packed: its kind is 'cutlass_fp8'" in story
        assert f"published, revision {revisions[0]}, step=20" in story
        text = ask("status", "--job", job).stdout
        assert "cutlass_fp8" in text
        assert "step=20" in text
        verified = ask("verify", "--revision", "2", "--job", job, "--json")
        assert verified.returncode == 0, verified.stderr
        assert json.loads(verified.stdout) == {
            "version": 2,
            "revision": revisions[0],
            "stated": revisions[0],
            "matches": True,
        }


def test_replicas_with_different_bytes_are_found_by_their_revisions(job, replicas):
    both = replicas(a={"compute_revision": True}, b={"compute_revision": True})
    both[0].order(1)
    both[1].order(1, flip=True)
    right, wrong = both[0].line(), both[1].line()
    assert right != wrong
    weights = model()
    with receiver(job, weights) as engine:
        with pytest.raises(transfuse.FingerprintMismatchError, match="different bytes"):
            engine.refit(timeout_s=10)
        assert engine.version == 0
        report = engine.refit(revision=right, timeout_s=30)
        assert same(weights, expected(1))
        assert str(report.revision) == right
        assert [step.source for step in report.steps] == ["b"]


def test_nothing_that_fits_is_an_error_that_names_every_source(job, replicas):
    publish(replicas(a={"kind": "hf_raw"}, b={}), 1)
    with receiver(job, model(), kinds="trtllm") as engine:
        with pytest.raises(transfuse.NoFittingSourceError) as caught:
            engine.refit(timeout_s=0.5)
        assert "'a': its kind is 'hf_raw', accepted: trtllm" in str(caught.value)
        assert "'b': it states no kind" in str(caught.value)


def test_a_layout_says_what_it_is_and_what_its_tensors_are():
    builder = transfuse.LayoutBuilder()
    tensor = builder.tensor("w", Dtype.F32, (4,))
    builder.tile(tensor, transfuse.Box.whole((4,)), builder.parameter("w", Dtype.F32, 4))
    builder.metadata(tensor, {"scales": "ue8m0"})
    plain = builder.build()
    assert (plain.kind, plain.metadata_of("w")) == ("", {"scales": "ue8m0"})
    raw = plain.with_kind("hf_raw")
    assert raw.kind == "hf_raw"
    assert raw != plain
    assert raw.with_kind("") == plain
    assert transfuse.Layout.decode(raw.encode()).metadata_of("w") == {"scales": "ue8m0"}
    with pytest.raises(transfuse.NotFoundError):
        raw.metadata_of("x")
    with pytest.raises(transfuse.InvalidArgumentError, match="without spaces"):
        raw.with_kind("two words")
    with pytest.raises(transfuse.InvalidArgumentError):
        builder.metadata(7, {"a": "b"})


def test_requirements_of_tensors_are_met_by_the_layout(job):
    def weights(scales):
        builder = transfuse.LayoutBuilder()
        tensor = builder.tensor("mlp.w", Dtype.F32, (4,))
        builder.tile(tensor, transfuse.Box.whole((4,)), builder.parameter("mlp.w", Dtype.F32, 4))
        builder.metadata(tensor, {"scales": scales})
        return builder.build()

    source = torch.arange(4.0)
    target = torch.zeros(4)
    with transfuse.Publisher(
        weights("ue8m0"), {"mlp.w": source}, name="a", job=job, metadata={"experts": "0,1"}
    ) as publisher:
        with publisher.write(1):
            pass
        for name, required, fits in [
            ("good", {"*.w": {"scales": "ue8m0"}, "attn.*": {"scales": PRESENT}}, True),
            ("bad", {"mlp.*": {"scales": "f32"}}, False),
        ]:
            with transfuse.Receiver(
                weights(""),
                {"mlp.w": target},
                name=name,
                job=job,
                require={"experts": PRESENT},
                require_tensors=required,
            ) as engine:
                if fits:
                    engine.refit(timeout_s=30)
                    assert torch.equal(source, target)
                    continue
                with pytest.raises(
                    transfuse.NoFittingSourceError, match="'scales' is 'ue8m0', 'f32' is demanded"
                ):
                    engine.refit(timeout_s=5)


def test_the_revision_of_shards_is_that_of_the_whole(job):
    builder = transfuse.LayoutBuilder()
    tensor = builder.tensor("w", Dtype.F32, (6,))
    builder.tile(tensor, transfuse.Box.whole((6,)), builder.parameter("w", Dtype.F32, 6))
    whole = builder.build()
    values = torch.arange(6.0)
    expected = transfuse.revision(whole, {"w": values})
    publishers = []
    for rank in range(2):
        builder = transfuse.LayoutBuilder()
        tensor = builder.tensor("w", Dtype.F32, (6,))
        parameter = builder.parameter("w", Dtype.F32, 3)
        builder.tile(tensor, transfuse.Box((3 * rank,), (3,)), parameter)
        layout = builder.build()
        shard = {"w": values[3 * rank : 3 * rank + 3]}
        with pytest.raises(transfuse.LayoutMismatchError, match="'?\"?w"):
            transfuse.revision(layout, shard)
        publishers.append(
            transfuse.Publisher(layout, shard, name=f"rank{rank}", source_count=2, job=job)
        )
    try:
        for publisher in publishers:
            with publisher.write(1, revision=str(expected)):
                pass
        found = transfuse.Control(job=job).revision("model")
        assert (found.version, found.computed, found.stated) == (1, expected, expected)
    finally:
        for publisher in publishers:
            publisher.close()


def test_bad_words_are_refused_before_anything_is_published(job):
    layout, parameters = hf.layout(model())
    for options in [
        {"metadata": {"k": "v" * 2000}},
        {"metadata": {"": "v"}},
        {"metadata": {"k": "two\nlines"}},
        {"metadata": {"k": 1.5}},
        {"metadata": {f"k{i}": "" for i in range(33)}},
        {"kind": "two words"},
    ]:
        with pytest.raises(transfuse.InvalidArgumentError):
            transfuse.Publisher(layout, parameters, name="a", job=job, **options)
    for options in [
        {"kinds": [""]},
        {"require": {"k": 1.5}},
        {"require": {"k": AtLeast("x")}},
        {"require_tensors": {"": {"k": "v"}}},
        {"revision": "0123"},
    ]:
        with pytest.raises(transfuse.InvalidArgumentError):
            transfuse.Receiver(layout, parameters, name="a", job=job, **options)
    with transfuse.Publisher(layout, parameters, name="a", job=job) as publisher:
        publisher.begin_write(1)
        with pytest.raises(transfuse.InvalidArgumentError):
            publisher.publish(1, metadata={"k": "v" * 2000})
        publisher.publish(1)
        with transfuse.Publisher(
            layout, parameters, name="b", job=job, model="other", compute_revision=True
        ) as other:
            other.begin_write(1)
            with pytest.raises(transfuse.FingerprintMismatchError):
                other.publish(1, revision="0" * 31 + "1")
            other.publish(1)
