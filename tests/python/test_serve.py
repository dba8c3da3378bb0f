"""`transfuse serve` by hand, on TCP with a token and on a socket; Ctrl-C ends it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import transfuse


def start(*arguments: str) -> tuple[subprocess.Popen[str], dict[str, object]]:
    """The process and what it says when it is ready."""
    program = shutil.which("transfuse")
    assert program is not None
    process = subprocess.Popen(
        [program, "serve", "--json", *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def interrupt(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


def test_members_of_a_tcp_coordinator_need_its_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a secret that nobody guesses\n")
    token.chmod(0o600)
    process, ready = start("--tcp", "127.0.0.1:0", "--token-file", str(token))
    try:
        address = str(ready["address"])
        assert not address.endswith(":0")
        control = transfuse.Control(job="told", address=address, token=token.read_text().strip())
        assert control.members() == []
        with pytest.raises(transfuse.PermissionDeniedError, match="token"):
            transfuse.Control(job="untold", address=address)
        with pytest.raises(transfuse.PermissionDeniedError, match="token"):
            transfuse.Control(job="mistaken", address=address, token="another")
        del control
    finally:
        interrupt(process)


def test_a_socket_is_of_its_user_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    socket = tmp_path / "policy.sock"
    process, ready = start("--socket", str(socket))
    try:
        assert ready["address"] == f"unix:{socket}"
        assert ready["pid"] == process.pid
        assert socket.stat().st_mode & 0o077 == 0
        second = subprocess.run(
            ["transfuse", "serve", "--socket", str(socket)],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert second.returncode == 1
        assert str(socket) in second.stderr
    finally:
        interrupt(process)
    assert not socket.exists()


def test_beyond_loopback_a_token_file_is_demanded() -> None:
    refused = subprocess.run(
        ["transfuse", "serve", "--tcp", "0.0.0.0:0"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert refused.returncode != 0
    assert "token" in refused.stderr


def ask(job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["transfuse", *arguments, "--job", job], capture_output=True, text=True, timeout=60
    )


def test_status_versions_and_why_tell_what_a_job_does(job: str) -> None:
    torch = pytest.importorskip("torch")
    from transfuse import hf

    nobody = ask(job, "status")
    assert nobody.returncode == 1
    assert "NOT_FOUND" in nobody.stderr
    source, target = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    with (
        transfuse.Publisher(
            *hf.layout(source), name="trainer0", job=job, retention="snapshot"
        ) as trainer,
        transfuse.Receiver(
            *hf.layout(target), name="rank0", job=job, into="shadow", group="engine", group_size=1
        ) as engine,
    ):
        for version in (1, 2):
            with trainer.write(version):
                pass
            engine.refit(timeout_s=30)
        model = json.loads(ask(job, "status", "--json").stdout)["models"]["model"]
        assert [s["name"] for s in model["sources"]] == ["trainer0"]
        assert model["sources"][0]["version"] == 2
        assert model["targets"][0]["version"] == 2
        assert model["targets"][0]["last_refit"]["version"] == 2
        assert model["targets"][0]["last_refit"]["size_bytes"] == 8 * 8 * 4 + 8 * 4
        assert (model["groups"][0]["state"], model["groups"][0]["version"]) == ("WHOLE", 2)
        text = ask(job, "status").stdout
        assert all(word in text for word in ("trainer0", "rank0", "WHOLE", "READY")), text
        versions = json.loads(ask(job, "versions", "--json").stdout)
        assert [(v["version"], v["state"]) for v in versions] == [(1, "READY"), (2, "READY")]
        story = json.loads(ask(job, "why", "2", "--json").stdout)
        told = [(event["who"], event["what"]) for event in story["events"]]
        assert told[0] == ("trainer0", "began to write")
        assert ("trainer0", "published") in told
        assert ("rank0", "voted ready") in told
        assert told.index(("trainer0", "published")) < told.index(("rank0", "voted ready"))
        times = [event["at_us"] for event in story["events"]]
        assert times == sorted(times)
        gaps = [later - before for before, later in zip(times, times[1:], strict=False)]
        assert story["longest_wait"]["us"] == max(gaps)
        assert "longest wait" in ask(job, "why", "2").stdout
        history = transfuse.Control(job=job).history("model", 2)
        assert [(event.who, event.what) for event in history] == told
        unknown = ask(job, "why", "77")
        assert unknown.returncode == 1
        assert "version 77" in unknown.stderr


def test_a_watched_status_ends_with_ctrl_c(job: str) -> None:
    control = transfuse.Control(job=job)
    process = subprocess.Popen(
        ["transfuse", "status", "--job", job, "--json", "--watch", "0.1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert lines[0]["models"] == {}
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
    del control
