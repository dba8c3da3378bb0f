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
