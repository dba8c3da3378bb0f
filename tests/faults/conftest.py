"""Trainer and engine processes of one test, how they are told what to do, and what must be left
of them afterwards: nothing."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("TRANSFUSE_BUILD", ROOT / "build" / "dev"))
PROGRAM = BUILD / "tests" / "transfuse_member"
SERVE = BUILD / "bin" / "transfuse"
ANSWER_S = 30  # nothing here takes so long, on any machine: who is silent for it hangs
PR_SET_CHILD_SUBREAPER = 36

# Short, so that what is due after a death or a stop is due soon; long against a busy machine.
TIMES = {
    "heartbeat_ms": 100,
    "member_ttl_ms": 1000,
    "lease_ttl_ms": 10000,
    "call_deadline_ms": 2000,
    "idle_exit_ms": 60000,
}


class Member:
    """One process: a trainer or an engine."""

    def __init__(self, job: Job, **times: int) -> None:
        self._ids = itertools.count(1)
        self._lines: queue.Queue = queue.Queue()
        self._answers: dict[int, dict] = {}
        self._events: list[str] = []
        self.killed = False
        self._log = job.log_folder / f"member-{len(job.members)}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(PROGRAM), str(job.folder), job.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=job.environment,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.times = TIMES | times

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, do: str, **arguments: object) -> int:
        """Asks, without waiting for the answer."""
        number = next(self._ids)
        request = {"id": number, "do": do, **arguments}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return number

    def _until(self, found: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + ANSWER_S
        while not found():
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no {what} in {ANSWER_S} s; log:\n{self._log.read_text()[-3000:]}")
            if line is None:
                self._lines.put(None)
                code = self.process.wait(ANSWER_S)
                pytest.fail(f"ended with {code} before {what}:\n{self._log.read_text()[-3000:]}")
            if "event" in line:
                self._events.append(line["event"])
            else:
                self._answers[line["id"]] = line

    def answer(self, number: int) -> dict:
        """What came back, good or bad."""
        self._until(lambda: number in self._answers, f"answer {number}")
        return self._answers.pop(number)

    def result(self, number: int) -> dict:
        """What came back, which is no error."""
        answer = self.answer(number)
        assert answer["ok"], f"{answer['code']}: {answer['message']}"
        return answer

    def call(self, do: str, **arguments: object) -> dict:
        """Asks and waits for what is no error."""
        return self.result(self.send(do, **arguments))

    def refused(self, code: str, do: str, **arguments: object) -> dict:
        """Asks and waits for an error of this code."""
        answer = self.answer(self.send(do, **arguments))
        assert not answer["ok"], f"{code} was expected: {answer}"
        assert answer["code"] == code, answer
        return answer

    def connect(self) -> Member:
        self.call("connect", **self.times)
        return self

    def wait_held(self) -> None:
        """Until the read that was to be held has come."""
        self._until(lambda: "held" in self._events, "read that is held")
        self._events.remove("held")

    def go(self) -> None:
        self.send("go")

    # -- trainer --

    def update(self, version: int, values: int | None = None) -> dict:
        """begin_write, write, publish."""
        return self.call("update", version=version, values=values or version)

    # -- engine --

    def start_refit(self, hold: tuple[str, int] | None = None, **request: object) -> int:
        """Begins a refit. `hold`: ("weights" or "words", which read) waits for go()."""
        if hold is not None:
            self.call("hold", what=hold[0], read=hold[1])
        number = self.send("refit", **request)
        if hold is not None:
            self.wait_held()
        return number

    def refit(self, **request: object) -> dict:
        """A refit that succeeds, and is right: every element is that of the version."""
        values = request.pop("values", None)
        return self.expect_right(self.start_refit(**request), values)

    def expect_right(self, number: int, values: int | None = None) -> dict:
        """The refit succeeded and every element is that of its version (or has `values`)."""
        answer = self.result(number)
        assert answer["holds"] == answer["version"] > 0
        wrong = self.call("check", values=values or answer["version"])["wrong"]
        assert wrong == 0, f"a false success: {wrong} wrong elements: {answer}"
        return answer

    def expect_outcome(self, number: int, codes: set[str], values: int | None = None) -> dict:
        """Either of both: a refit that is right, or one of the errors, with no version held."""
        answer = self.answer(number)
        if answer["ok"]:
            wrong = self.call("check", values=values or answer["version"])["wrong"]
            assert wrong == 0, f"a false success: {wrong} wrong elements: {answer}"
        else:
            assert answer["code"] in codes, answer
        return answer

    def stage(self, **request: object) -> int:
        """The version that is staged and verified now."""
        return self.call("stage", **request)["version"]

    def expect_held(self, version: int, values: int | None = None) -> None:
        """The parameters are those of this version, every element of them."""
        answer = self.call("check", values=values or version)
        assert (answer["holds"], answer["wrong"]) == (version, 0), answer

    def group(self) -> dict:
        """The only group that the coordinator knows."""
        (group,) = self.call("groups")["groups"]
        return group

    def stats(self) -> dict:
        return self.call("stats")

    # -- the end --

    def stop(self) -> None:
        """SIGSTOP; returns when it stands still."""
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: process_state(self.pid) == "T", "the stop of a member")

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.killed = True
        self.process.kill()
        self.process.wait(ANSWER_S)

    def close(self) -> int:
        """Ends of its own accord, and says how."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.stdin.close()
            try:
                self.process.wait(ANSWER_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(ANSWER_S)
        return self.process.returncode


class Coordinator:
    """The coordinator that a member has started: a process that is nobody's child but ours, since
    this process adopts what its children leave behind."""

    def __init__(self, pid: int, epoch: int) -> None:
        self.pid = pid
        self.epoch = epoch

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: process_state(self.pid) == "T", "the stop of the coordinator")

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)
        self.wait()

    def wait(self) -> None:
        wait_until(lambda: process_state(self.pid) in {"Z", ""}, "the end of the coordinator")
        os.waitpid(self.pid, 0)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


class Job:
    """The processes of one test, in a run-time folder of their own."""

    def __init__(self, log_folder: Path) -> None:
        self.log_folder = log_folder
        self.build = BUILD
        self.folder = Path(tempfile.mkdtemp(prefix="job-", dir="/tmp"))  # a socket path is short
        self.name = self.folder.name
        self.members: list[Member] = []
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("TRANSFUSE_")
        } | {"TRANSFUSE_SERVE_COMMAND": str(SERVE)}

    def start(self, **times: int) -> Member:
        """A process that has not connected yet."""
        member = Member(self, **times)
        self.members.append(member)
        return member

    def trainer(self, name: str = "trainer0", **options: object) -> Member:
        return self._open("publisher", {"name": name, "spec": "fsdp:dp=1,dtype=f32"} | options)

    def engine(self, name: str = "engine0", **options: object) -> Member:
        return self._open("receiver", {"name": name, "spec": "hf"} | options)

    def _open(self, role: str, options: dict) -> Member:
        times = {key: options.pop(key) for key in TIMES if key in options}
        replaces_dead = options.pop("replaces_dead", False)
        member = self.start(**times).connect()
        deadline = time.monotonic() + ANSWER_S
        while True:
            answer = member.answer(member.send(role, **options))
            if answer["ok"]:
                return member
            # Its name is free at the latest when the time of the dead one has run out.
            assert replaces_dead, answer
            assert answer["code"] == "ALREADY_EXISTS", answer
            assert time.monotonic() < deadline, answer
            time.sleep(0.05)

    def rank(self, number: int, size: int = 2, **options: object) -> Member:
        """A rank of an engine that commits as a group, with a shadow unless told otherwise."""
        group = {"group": "engine", "group_size": size, "into": "shadow"}
        return self.engine(f"rank{number}", **(group | options))

    def coordinator(self, member: Member) -> Coordinator:
        info = member.call("coordinator")
        return Coordinator(info["pid"], info["epoch"])

    def wait_gone(self, name: str, asked: Member) -> None:
        """Until the coordinator counts a member that died as dead."""
        names = lambda: [each["name"] for each in asked.call("members")["members"]]  # noqa: E731
        wait_until(lambda: name not in names(), f"the loss of {name}")

    def remaining(self) -> list[int]:
        """Processes that were started for this job and still run."""
        return [pid for pid, words in command_lines() if str(self.folder) in words]

    def end(self) -> None:
        """Everybody leaves; then the coordinator is told to end."""
        codes = {member.close() for member in self.members if not member.killed}
        for member in self.members:
            member.close()
        for pid in self.remaining():
            coordinator = Coordinator(pid, 0)
            coordinator.resume()
            coordinator.kill(signal.SIGTERM)
        if any(member.killed for member in self.members):
            # The sockets of the dead go when the next process opens the folder.
            next_one = self.start(idle_exit_ms=1).connect()
            codes.add(next_one.close())
            wait_until(lambda: not self.remaining(), "the exit of the idle coordinator")
        assert codes <= {0}, f"a member ended with {codes}"

    def files(self) -> list[str]:
        return sorted(os.listdir(self.folder)) if self.folder.exists() else []


def process_state(pid: int) -> str:
    """The letter of /proc/<pid>/stat, "" for no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def command_lines() -> Iterator[tuple[int, list[str]]]:
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        yield int(entry), words.split("\0")


def children() -> set[int]:
    """Children of this process, dead ones that nobody has waited for included."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        try:
            found |= {int(p) for p in Path(f"/proc/self/task/{task}/children").read_text().split()}
        except FileNotFoundError:
            continue
    return found


def reap_adopted(before: set[int]) -> None:
    """Collects dead coordinators that members had started."""
    for pid in children() - before:
        Coordinator(pid, 0).wait()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + ANSWER_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {ANSWER_S} s for {what}"
        time.sleep(0.005)


def held_by_somebody(name: str) -> bool:
    """True if a living process has the file of /dev/shm open or mapped: then it is not ours."""
    for pid, _ in command_lines():
        try:
            if f"/dev/shm/{name}" in Path(f"/proc/{pid}/maps").read_text():
                return True
        except OSError:
            continue
    return False


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    for program in (PROGRAM, SERVE):
        assert program.exists(), f"{program} is missing: make build, or set TRANSFUSE_BUILD"
    shared = set(os.listdir("/dev/shm"))
    adopted = children()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started = Job(tmp_path)
    try:
        yield started
        started.end()
    finally:
        for member in started.members:
            if member.process.poll() is None:
                member.kill()
        for pid in started.remaining():
            Coordinator(pid, 0).kill()
        reap_adopted(adopted)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        left = started.files()
        shutil.rmtree(started.folder, ignore_errors=True)
    assert not left, f"left in the run-time folder: {left}"
    assert children() <= adopted, "a child that nobody has waited for"
    grown = [name for name in set(os.listdir("/dev/shm")) - shared if not held_by_somebody(name)]
    assert not grown, f"left in /dev/shm: {grown}"
