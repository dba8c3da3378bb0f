"""What another process or a caller says and is not so, and what the system does not allow: a typed
error that names it, and everybody goes on."""

from __future__ import annotations

import re
import shutil
import socket

import pytest

# lie -> what an honest reader finds; see liar.cc
LIES = {
    "larger_region": ("CORRUPT", "expected .* bytes by its descriptor, found"),
    "beyond_region": ("CORRUPT", "of region 0, which has"),
    "offset_wraps": ("CORRUPT", "of region 0, which has"),
    "no_such_place": ("CORRUPT", "of region 7"),
    "unregistered_region": ("NOT_FOUND", "region 1234567"),
    "nothing_mapped": ("CORRUPT", "process_vm_readv"),
    "fewer_places": ("CORRUPT", "parameters, expected"),
    "another_layout": ("CORRUPT", "binding 0 of layout"),
    "no_generation": ("CORRUPT", "no generation"),
    "another_transport": ("UNSUPPORTED", "carrier pigeon"),
    "nobody_there": ("UNAVAILABLE", "-gone"),
    "another_generation": ("TORN_READ", "generation"),
    "no_such_slot": ("CORRUPT", "slot 5"),
    "garbage": ("CORRUPT", "member descriptor"),
    "truncated": ("CORRUPT", "member descriptor"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_source_that_lies_about_its_memory_is_refused_and_named(job, lie):
    code, words = LIES[lie]
    liar = job.start().connect()
    liar.call("liar", lie=lie, spec="fsdp:dp=1,dtype=f32")
    engine = job.engine(verify=False, max_attempts=3)
    failed = engine.refused(code, "refit", deadline_ms=5000)
    assert re.search(words, failed["message"])
    assert failed["holds"] == 0
    stats = engine.stats()
    assert (stats["tickets"], stats["poisoned_bytes"]) == (0, 0)
    # The engine is as good as before.
    assert liar.close() == 0
    trainer = job.trainer(replaces_dead=True)
    trainer.update(2)
    assert engine.refit()["version"] == 2


def test_the_same_source_without_a_lie_is_read(job):
    honest = job.start().connect()
    honest.call("liar", lie="none", spec="fsdp:dp=1,dtype=f32")
    assert job.engine(verify=False).refit()["version"] == 1


@pytest.mark.parametrize(
    ("lie", "code", "words"),
    [
        ("wrong_sums", "FINGERPRINT_MISMATCH", r"tensor 'lm_head\.weight' box \[0:\d+, 0:24\]"),
        ("short", "CORRUPT", r"announced fingerprint tables of 64 bytes"),
        ("garbage", "CORRUPT", r"malformed region"),
        ("unfinished", "DEADLINE_EXCEEDED", r"no progress with its fingerprints"),
        (None, "DEADLINE_EXCEEDED", r"trainer0|fingerprint|get_table"),
    ],
    ids=["wrong-sums", "short", "garbage", "unfinished", "silent"],
)
def test_a_source_that_lies_about_its_fingerprints_is_never_a_success(job, lie, code, words):
    liar = job.start().connect()
    liar.call("liar", lie="none", spec="fsdp:dp=1,dtype=f32")
    engine = job.engine(no_progress_ms=200, max_attempts=1)
    refit = engine.send("refit", deadline_ms=10000)
    if lie is not None:
        liar.call("liar_table", lie=lie)
    failed = engine.answer(refit)
    assert failed.get("code") == code, failed
    assert re.search(words, failed["message"]), failed["message"]
    assert failed["holds"] == 0
    assert engine.stats()["tickets"] == 0


@pytest.mark.parametrize(
    ("trainers", "engine", "words"),
    [
        (
            {"spec": "fsdp:dp=2,dtype=f32"},
            {},
            r'\[51:101, 0:24\] of tensor "model\.embed_tokens\.weight"',
        ),
        ({"vocab_size": 97}, {}, r"model\.embed_tokens\.weight.*\[97, 24\]"),
        ({"intermediate_size": 48}, {"spec": "vllm:tp=2"}, r"mlp\.\w+_proj\.weight"),
        ({"num_hidden_layers": 1}, {}, r"model\.layers\.1\.\S+"),
        ({"spec": "fsdp:dp=1,dtype=bf16"}, {"spec": "hf:dtype=f16"}, r"f16.*bf16"),
        ({}, {"broken": "overlap"}, r"overlap.*model\.\S+"),
        ({}, {"broken": "uncovered"}, r"uncovered.*\S+ \[\d+:\d+\]"),
    ],
    ids=["gap", "shape", "shape-fused", "tensor-missing", "dtype", "overlap", "uncovered"],
)
def test_layouts_that_do_not_fit_are_a_mismatch_that_names_tensor_and_box(
    job, trainers, engine, words
):
    trainer = job.trainer(**trainers)
    trainer.update(1)
    reader = job.engine(**engine)
    failed = reader.refused("LAYOUT_MISMATCH", "refit")
    assert re.search(words, failed["message"], re.DOTALL), failed["message"]
    assert failed["elapsed_ms"] < 4000  # no retry can help
    assert failed["holds"] == 0


def test_an_engine_keeps_its_version_when_the_next_one_does_not_fit(job):
    trainer = job.trainer()
    engine = job.engine()
    trainer.update(1)
    engine.refit()
    trainer.call("close_publisher")
    trainer.call("publisher", name="trainer0", spec="fsdp:dp=1,dtype=f32", vocab_size=97)
    trainer.update(2)
    assert engine.refused("LAYOUT_MISMATCH", "refit")["holds"] == 1
    assert engine.call("check", values=1)["wrong"] == 0
    trainer.call("close_publisher")
    trainer.call("publisher", name="trainer0", spec="fsdp:dp=1,dtype=f32")
    trainer.update(3)
    assert engine.refit()["version"] == 3


def test_more_shared_memory_than_there_is_is_an_error_and_not_a_signal(job):
    member = job.start().connect()
    before = member.stats()
    refused = member.refused("RESOURCE_EXHAUSTED", "allocate", size_bytes=1 << 46)
    assert str(1 << 46) in refused["message"]
    refused = member.refused(
        "RESOURCE_EXHAUSTED",
        "publisher",
        name="trainer0",
        memory="arena",
        vocab_size=1 << 30,
        hidden_size=1 << 20,
    )
    assert "room for" in refused["message"]
    after = member.stats()
    assert (after["descriptors"], after["regions"]) == (before["descriptors"], before["regions"])
    member.call("allocate", size_bytes=1 << 20)
    member.call("publisher", name="trainer0", memory="arena")
    member.update(1)
    assert job.engine().refit()["version"] == 1


def test_memory_that_the_kernel_does_not_let_read_names_the_remedy_and_the_remedy_helps(job):
    trainer = job.start().connect()
    trainer.call("hide_memory")
    trainer.call("publisher", name="trainer0", memory="heap")
    trainer.update(1)
    engine = job.start()
    engine.call("drop_ptrace_right")
    engine.connect().call("receiver", name="engine0")
    failed = engine.refused("PERMISSION_DENIED", "refit")
    for remedy in ("ptrace_scope", "allow_any_tracer", "allocate()"):
        assert remedy in failed["message"]
    assert failed["holds"] == 0
    trainer.call("close_publisher")
    trainer.call("publisher", name="trainer0", memory="arena")
    trainer.update(2)
    answer = engine.refit()
    assert answer["version"] == 2
    assert {route["route"] for route in answer["report"]["routes"]} == {"memfd"}


def test_sockets_of_a_dead_run_are_in_nobodys_way_and_go(job):
    trainer = job.trainer()
    engine = job.engine()
    trainer.update(1)
    engine.refit()
    dead = job.coordinator(engine)
    engine.kill()
    trainer.kill()
    dead.kill()
    stale = set(job.files())
    assert any(name.startswith("tf-") for name in stale)
    assert f"{job.name}.sock" in stale
    trainer = job.trainer()
    trainer.update(1)
    assert job.engine().refit()["version"] == 1
    assert job.coordinator(trainer).epoch > dead.epoch
    members = {name for name in stale if name.startswith("tf-")}
    assert not members & set(job.files())


def test_a_socket_that_nobody_listens_on_is_replaced(job):
    path = str(job.folder / f"{job.name}.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
    trainer = job.trainer()
    trainer.update(1)
    assert job.engine().refit()["version"] == 1


def test_a_run_time_folder_that_others_may_enter_is_refused(job):
    job.folder.chmod(0o755)
    refused = job.start().refused("PERMISSION_DENIED", "connect")
    assert str(job.folder) in refused["message"]
    assert "0700" in refused["message"]
    shutil.rmtree(job.folder)
    job.start().connect()  # made anew, private
    assert job.folder.stat().st_mode & 0o777 == 0o700


def test_no_program_to_start_the_coordinator_with_is_said(job):
    right = job.environment["TRANSFUSE_SERVE_COMMAND"]
    for wrong, code in {"/nowhere/transfuse": "NOT_FOUND", "/bin/false": "UNAVAILABLE"}.items():
        job.environment["TRANSFUSE_SERVE_COMMAND"] = wrong
        assert wrong in job.start().refused(code, "connect")["message"]
        assert job.files() == []
    job.environment["TRANSFUSE_SERVE_COMMAND"] = right
    job.start().connect()
