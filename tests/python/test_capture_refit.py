"""Refits through captured layouts, what is derived after a commit, and parameters that move."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transfuse
from capture_rank import CATALOG, SHAPES, Engine
from transfuse import Box, Dtype, PointerGuard, PointerMovedError, hf

RANK = Path(__file__).resolve().parent / "capture_rank.py"


class Trainer:
    """Whole tensors of the catalog, other ones for every version."""

    def __init__(self, job):
        builder = transfuse.LayoutBuilder()
        self.weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for spec in CATALOG:
            tensor = builder.tensor(spec.name, spec.dtype, spec.shape)
            parameter = builder.parameter(spec.name, Dtype.F32, self.weights[spec.name].numel())
            builder.tile(tensor, Box.whole(spec.shape), parameter)
        self.publisher = transfuse.Publisher(
            builder.build(), self.weights, name="trainer0", job=job, allow_any_tracer=True
        )

    def publish(self, version):
        with self.publisher.write(version):
            for index, weight in enumerate(self.weights.values()):
                torch.manual_seed(100 * version + index)
                weight.normal_()


@pytest.fixture
def trainer(job):
    made = Trainer(job)
    yield made
    made.publisher.close()


def expected(weights, rank, size):
    """What the engine's own loader makes of them, and what is derived from that."""
    engine = Engine(rank, size)
    engine.load_weights(iter(weights.items()))
    engine.derive("o", engine.parameters["o"])
    found = {**engine.parameters, **engine.derived}
    return {name: value.tolist() for name, value in found.items()}


@pytest.fixture
def ranks(job):
    started = []

    def start(size, into):
        for rank in range(size):
            command = [sys.executable, str(RANK), job, str(rank), str(size), into]
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        return [json.loads(process.stdout.readline()) for process in started]

    def ask(line):
        for process in started:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in started]

    yield start, ask
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("into", ["in_place", "shadow"])
def test_an_engine_of_two_processes_is_refitted_through_its_own_loader(trainer, ranks, into):
    """A tensor goes by fallback; weights change in every one of the warm cycles."""
    start, ask = ranks
    assert start(2, into) == [{"direct": 5, "followed": 2, "fallback": 1, "unused": 0}] * 2
    before = None
    for version in range(1, 6):
        trainer.publish(version)
        said = ask(f"refit {version}")
        wanted = [expected(trainer.weights, rank, 2) for rank in range(2)]
        assert [s.get("held", s) for s in said] == wanted
        assert [s["version"] for s in said] == [version] * 2
        assert said[0]["hooks"] == ["load_weights of what goes by fallback", "o"]
        if version < 5:
            before = wanted
    assert all("held" in s for s in ask("check"))
    if into == "shadow":
        assert [s.get("held", s) for s in ask("rollback")] == before


def one_rank(job, into="in_place", **options):
    engine = Engine(0, 1)
    captured = transfuse.capture(engine.load_weights, engine.parameters, CATALOG)
    return engine, captured.receiver(name="engine0", job=job, into=into, **options)


def test_hooks_run_in_their_order_after_the_commit_of_a_shadow(trainer, job):
    seen = []
    engine, receiver = one_rank(
        job,
        into="shadow",
        after_commit={"first": lambda: seen.append("first")},
        derived={
            "q*": lambda name, memory: seen.append((name, memory.clone())),
            "*": lambda name, memory: seen.append(name),
        },
    )
    with receiver:
        trainer.publish(1)
        receiver.stage(timeout_s=30).wait(30)
        assert seen == []
        assert receiver.version == 0
        receiver.commit()
        assert receiver.version == 1
        assert seen[0] == "first"
        assert seen[1][0] == "qkv"
        assert torch.equal(seen[1][1][:8], trainer.weights["q"])
        assert seen[2:] == ["experts", "fallback:norm", "o", "qkv", "table"]
        assert [run.parameter for run in receiver.hook_runs][:3] == ["", "", "qkv"]
        assert all(run.microseconds >= 0 and not run.error for run in receiver.hook_runs)


@pytest.mark.parametrize("into", ["in_place", "shadow"])
def test_a_hook_that_fails_is_named_and_the_engine_has_no_version_until_it_succeeds(
    trainer, job, into
):
    broken = {"now": True}
    seen = []

    def derive(name, memory):
        seen.append(name)
        if broken["now"]:
            raise ZeroDivisionError("no inverse")

    engine, receiver = one_rank(
        job, into=into, group="engine", group_size=1, derived={"qkv": derive, "t*": derive}
    )
    with receiver:
        trainer.publish(1)
        with pytest.raises(
            transfuse.AfterCommitError, match="version 1.*'qkv' for qkv.*no inv"
        ) as e:
            receiver.refit(timeout_s=30)
        assert (e.value.hook, e.value.parameter, e.value.version) == ("qkv", "qkv", 1)
        assert isinstance(e.value.__cause__, ZeroDivisionError)
        assert seen == ["qkv"]
        assert receiver.hook_runs[-1].error == "ZeroDivisionError: no inverse"
        assert receiver.version == 0
        assert torch.equal(engine.parameters["o"], trainer.weights["o"])  # the weights are there
        with pytest.raises(transfuse.GroupBrokenError, match="engine0.*'qkv'.*run_hooks"):
            receiver.check_group()
        broken["now"] = False
        receiver.run_hooks()
        assert receiver.version == 1
        assert receiver.check_group().state == transfuse.GroupState.WHOLE
        broken["now"] = True
        trainer.publish(2)
        with pytest.raises(transfuse.AfterCommitError, match="version 2"):
            receiver.refit(timeout_s=30)
        broken["now"] = False
        trainer.publish(3)
        assert receiver.refit(timeout_s=30).version == receiver.version == 3


def test_hooks_do_not_run_when_nothing_was_committed(trainer, job):
    seen = []
    _, receiver = one_rank(
        job, into="shadow", derived={"o": lambda name, memory: seen.append(name)}
    )
    with receiver:
        with pytest.raises(transfuse.DeadlineExceededError):
            receiver.refit(exactly=9, timeout_s=0.3)
        trainer.publish(1)
        receiver.refit(timeout_s=30)
        with pytest.raises(transfuse.DeadlineExceededError):
            receiver.refit(exactly=9, timeout_s=0.3)
        assert seen == ["o"]
        assert receiver.version == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"derived": {"qvk": print}}, "'qvk' is the name of no parameter; found experts"),
        ({"derived": {"qkv": 3}}, "hook 'qkv': expected a callable, found int"),
        ({"after_commit": {"mine": None}}, "hook 'mine': expected a callable, found NoneType"),
        ({"guard": 3}, "expected a module or tensors by name, found int"),
    ],
)
def test_hooks_that_make_no_sense_are_refused_at_once(job, options, message):
    with pytest.raises(transfuse.InvalidArgumentError, match=message):
        one_rank(job, **options)


def module():
    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))


def test_a_guard_names_the_parameter_that_moved_with_both_places():
    weights = module()
    guard = PointerGuard(weights)
    guard.check()
    with torch.no_grad():
        weights[0].weight.add_(1)
    guard.check()  # other values, the same place
    before = weights[1].weight.data_ptr()
    weights[1].weight.data = weights[1].weight.data.clone()
    with pytest.raises(PointerMovedError, match="1.weight: moved .later.: expected 0x") as caught:
        guard.check("later")
    error = caught.value
    assert (error.parameter, error.expected.address) == ("1.weight", before)
    assert error.found.address == weights[1].weight.data_ptr()
    assert error.found.storage_bytes == 96
    guard.restore()
    guard.check()


def rebind(weights, name, tensor):
    weights.get_parameter(name).data = tensor


MOVES = {
    "another parameter object": lambda m: setattr(m[0], "bias", torch.nn.Parameter(torch.zeros(6))),
    "other strides": lambda m: rebind(m, "1.weight", m[1].weight.data.as_strided((4, 6), (1, 4))),
    "gone": lambda m: setattr(m[0], "bias", None),
}


@pytest.mark.parametrize("case", MOVES)
def test_a_guard_sees_every_way_to_move(case):
    weights = module()
    guard = PointerGuard(weights)
    MOVES[case](weights)
    with pytest.raises(PointerMovedError):
        guard.check()


def test_a_parameter_that_moved_stops_the_refit_before_it_writes(job):
    source, target = module(), module()
    layout, parameters = hf.layout(target)
    with (
        transfuse.Publisher(*hf.layout(source), name="trainer0", job=job) as publisher,
        transfuse.Receiver(layout, parameters, name="e", job=job, guard=target) as receiver,
    ):
        with publisher.write(1):
            pass
        receiver.refit(timeout_s=30)
        assert receiver.version == 1
        held, old = target[0].weight.data, target[0].weight.detach().clone()
        target[0].weight.data = held.clone()
        with publisher.write(2), torch.no_grad():
            source[0].weight.add_(1)
        with pytest.raises(PointerMovedError, match="0.weight.*before the refit"):
            receiver.refit(timeout_s=30)
        assert receiver.version == 0
        assert torch.equal(held, old)
        target[0].weight.data = held
        receiver.refit(timeout_s=30)
        assert receiver.version == 2
        assert torch.equal(source[0].weight, target[0].weight)


def test_a_hook_that_moves_a_parameter_is_found_after_the_commit(job):
    source, target = module(), module()

    def repack(name, memory):
        target[1].weight.data = target[1].weight.data.clone()

    layout, parameters = hf.layout(target)
    with (
        transfuse.Publisher(*hf.layout(source), name="trainer0", job=job) as publisher,
        transfuse.Receiver(
            layout, parameters, name="e", job=job, guard=target, derived={"1.weight": repack}
        ) as receiver,
    ):
        with publisher.write(1):
            pass
        with pytest.raises(PointerMovedError, match="1.weight.*after the commit"):
            receiver.refit(timeout_s=30)
        assert receiver.version == 0


def test_a_model_of_transformers_is_captured_as_its_layout_says(job):
    """load_state_dict is a loader too; tied names are one parameter."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 70,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    for kind in ("Llama", "Qwen2", "Qwen3"):
        for tied in (False, True):
            config = getattr(transformers, f"{kind}Config")(
                **sizes, tie_word_embeddings=tied, head_dim=8, architectures=[f"{kind}ForCausalLM"]
            )
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
            before = {name: value.detach().clone() for name, value in model.named_parameters()}
            captured = transfuse.capture(
                lambda weights, model=model: model.load_state_dict(dict(weights), strict=False),
                model,
                hf.layout(model)[0].tensors,
                require_all=True,
            )
            assert captured.layout.digest == hf.layout(model)[0].digest
            catalog = transfuse.make_catalog(
                transfuse.parse_model_config(json.dumps(config.to_dict()))
            )
            assert {t.name: t.shape for t in catalog} == {
                t.name: t.shape for t in captured.layout.tensors
            }
            for name, value in model.named_parameters():
                assert torch.equal(value, before[name])


def test_the_benchmark_captures_what_the_formula_says(tmp_path):
    bench = Path(__file__).resolve().parents[2] / "bench/capture.py"
    command = [sys.executable, str(bench), "--layers", "1", "--repetitions", "1"]
    subprocess.run([*command, "--json", str(tmp_path / "rows.json")], check=True, timeout=240)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["tensors"], row["used"]) for row in rows] == [(396, 396), (396, 396), (396, 108)]
