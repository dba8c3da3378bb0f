#!/usr/bin/env python3
"""Checks the rules of the house that no compiler knows: layers, sizes, heads of files, names.

Reads every source file once and finishes in well under a second. Rules about folders and limits are
data in layers.toml beside this file; the rest is one function per rule, below. Each function takes
one File and yields (line number, message). Exit code 0: clean; 1: findings, one per line.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOP_FOLDERS = (
    *("apps", "bench", "cmake", "docs", "include"),
    *("python", "src", "tests", "tools", "web"),
)
SKIPPED_FOLDERS = {"build", "results", "__pycache__", "node_modules", "third_party"}
CPP = {".h", ".cc"}
CODE = CPP | {".py", ".proto", ".cmake", ".sh"}

Finding = tuple[int, str]


@dataclass(frozen=True)
class Layers:
    """layers.toml, parsed."""

    folders: dict[str, dict[str, list[str]]]
    limits: dict[str, int]
    only: dict[str, list[str]]
    exempt_length: frozenset[str]

    @staticmethod
    def load(path: Path) -> Layers:
        data: dict[str, Any] = tomllib.loads(path.read_text())
        return Layers(
            folders=data["folders"],
            limits=data["limits"],
            only=data.get("only", {}),
            exempt_length=frozenset(data.get("exempt", {}).get("line_columns", [])),
        )

    def folder_of(self, path: str) -> str | None:
        """The longest declared folder that contains `path`, or None."""
        parts = path.split("/")[:-1]
        for end in range(len(parts), 0, -1):
            if (candidate := "/".join(parts[:end])) in self.folders:
                return candidate
        return None


@dataclass(frozen=True)
class File:
    """One source file: its path from the root with forward slashes, and its lines."""

    path: str
    lines: list[str]
    layers: Layers

    @property
    def suffix(self) -> str:
        return Path(self.path).suffix

    @property
    def is_test(self) -> bool:
        name = Path(self.path).name
        return bool(re.search(r"_test\.(cc|py)$", name)) or name.startswith("test_")


def include_lines(file: File) -> Iterator[tuple[int, str, bool]]:
    """(line number, path, quoted?) of every #include."""
    for number, line in enumerate(file.lines, 1):
        if match := re.match(r'\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', line):
            yield number, match[1] or match[2], match[1] is not None


def check_includes(file: File) -> Iterator[Finding]:
    """A folder includes only what layers.toml allows it."""
    if file.suffix not in CPP:
        return
    folder = file.layers.folder_of(file.path)
    if folder is None:
        yield 1, "folder is not in tools/layers.toml: add it with what it may include"
        return
    rule = file.layers.folders[folder]
    allowed = rule["uses"] + (rule.get("test_uses", []) if file.is_test else [])
    for number, included, quoted in include_lines(file):
        if not quoted or included.endswith(".pb.h"):
            continue
        if included.startswith("transfuse/"):
            header = included.removeprefix("transfuse/").removesuffix(".h")
            own = folder == "include/transfuse"
            if not own and "*" not in rule["headers"] and header not in rule["headers"]:
                yield number, f"{folder} may not include the public header {included}"
            continue
        target = file.layers.folder_of(f"src/{included}")
        if target is None:
            beside = Path(file.path).parent.joinpath(included).as_posix()
            if folder.startswith("src/") and "/" not in included:
                yield number, f'write the whole path: "{folder[4:]}/{included}"'
            elif folder.startswith("src/"):
                yield number, f"{included} is not ours: include it with <>"
            elif file.layers.folder_of(os.path.normpath(beside)) not in {folder, *allowed}:
                yield number, f"{folder} may not include {included}"
        elif target != folder and "*" not in allowed and target not in allowed:
            yield number, f"{folder} may not include {included}: {target} is not among its layers"


def check_only(file: File) -> Iterator[Finding]:
    """A third-party library is seen only in its own folder."""
    if file.suffix not in CPP:
        return
    for number, included, _ in include_lines(file):
        for word, allowed in file.layers.only.items():
            if word in included and not any(file.path.startswith(f) for f in allowed):
                yield number, f"<{included}> may be included only in {', '.join(allowed)}"


def check_size(file: File) -> Iterator[Finding]:
    """Files and lines have a limit."""
    limits = file.layers.limits
    if file.suffix in CODE:
        limit = limits["test_lines"] if file.is_test else limits["file_lines"]
        if file.path.startswith("include/"):
            limit = limits["header_lines"]
        if len(file.lines) > limit:
            yield len(file.lines), f"file has {len(file.lines)} lines, the limit is {limit}"
        for number, line in enumerate(file.lines, 1):
            if len(line) > limits["line_columns"] and file.path not in file.layers.exempt_length:
                yield number, f"line has {len(line)} columns, the limit is {limits['line_columns']}"


def head_comment(file: File) -> str:
    """The comment or docstring that a file begins with, as one text; empty if there is none."""
    lines = file.lines[1:] if file.lines and file.lines[0].startswith("#!") else file.lines
    if file.suffix in {".py", ".pyi"}:
        body = "\n".join(lines).lstrip()
        match = re.match(r'r?"""(.*?)"""', body, re.DOTALL)
        if match:
            return match[1].strip()
    mark = "//" if file.suffix in CPP | {".proto"} else "#"
    words = []
    for line in lines:
        if not line.startswith(mark):
            break
        words.append(line.removeprefix(mark).strip())
    return " ".join(words).strip()


def check_head(file: File) -> Iterator[Finding]:
    """A file begins with one sentence that says what it is for."""
    is_cmake = Path(file.path).name == "CMakeLists.txt" and file.path != "CMakeLists.txt"
    if file.suffix not in CODE and not is_cmake:
        return
    if not "".join(file.lines).strip():
        return
    head = head_comment(file)
    if not head:
        yield 1, "begin the file with a comment that says in one sentence what it is for"
    elif "." not in head and ":" not in head:
        yield 1, "the comment at the head of the file is not a sentence"


def check_text(file: File) -> Iterator[Finding]:
    """No trailing blanks, no tabs in code, a newline at the end, header guards, no open ends."""
    unfinished = re.compile(r"\b(TO[D]O|FIX[M]E|X[X]X|HA[C]K)\b")
    for number, line in enumerate(file.lines, 1):
        if line != line.rstrip():
            yield number, "trailing blanks"
        if "\t" in line and file.suffix in CODE:
            yield number, "a tab: use spaces"
        if found := unfinished.search(line):
            yield number, f"{found[0]}: finish it, or open an issue"
        if file.suffix == ".h" and re.match(r"\s*using namespace\b", line):
            yield number, "using namespace in a header"
    if file.suffix == ".h" and "#pragma once" not in file.lines:
        yield 1, "a header without #pragma once"


def check_names(file: File) -> Iterator[Finding]:
    """source and target; nouns of the domain instead of patterns."""
    if file.suffix not in CPP | {".py", ".pyi", ".proto"}:
        return
    short = re.compile(r"(?<![\w/\"'.-])(?:\w+_)?(?:s[r]c|d[s]t)(?:_\w+)?(?![\w/\"'-])")
    pattern = re.compile(r"\b(?:class|struct)\s+(\w*(?:Manager|Helper|Utils?|Impl|Base))\b")
    for number, line in enumerate(file.lines, 1):
        if re.match(r"\s*#\s*include", line):
            continue
        if found := short.search(line):
            yield number, f"{found[0]}: write source and target"
        if found := pattern.search(line):
            yield number, f"{found[1]}: name it by what it is, not by a pattern"


def check_core_errors(file: File) -> Iterator[Finding]:
    """The core returns errors as values, and locks are ones that the analysis understands."""
    if not file.path.startswith(("src/", "include/")) or file.suffix not in CPP:
        return
    for number, line in enumerate(file.lines, 1):
        code = re.sub(r'"(?:[^"\\]|\\.)*"', '""', line.split("//")[0])
        if not file.is_test and re.search(r"\bthrow\b", code):
            yield number, "the core does not throw: return a Result"
        exempt = file.is_test or file.path == "src/base/mutex.h"
        if not exempt and re.search(r"\bstd::(mutex|lock_guard|scoped_lock)\b", code):
            yield number, "use Mutex and MutexLock of base/mutex.h"


def check_tests(file: File) -> Iterator[Finding]:
    """The name of a test is a sentence that would be false if the test failed."""
    vague = re.compile(r"^(Basic|Works|Simple|Sanity|Test|Misc)\w*$|^Test\d")
    for number, line in enumerate(file.lines, 1):
        if file.suffix == ".cc" and (match := re.match(r"TEST(?:_[FP])?\((\w+),\s*(\w+)\)", line)):
            name = re.sub(r"^[IT]\d+_", "", match[2])
            words = re.findall(r"[A-Z][a-z0-9]*", name)
            if vague.match(name) and len(words) < 3 or len(words) < 2:
                yield number, f"{match[2]}: name the test by a sentence that it proves"
        if file.suffix == ".py" and file.is_test:
            if (match := re.match(r"\s*def (test_\w+)", line)) and match[1].count("_") < 2:
                yield number, f"{match[1]}: name the test by a sentence that it proves"


RULES: tuple[Callable[[File], Iterator[Finding]], ...] = (
    check_includes,
    check_only,
    check_size,
    check_head,
    check_text,
    check_names,
    check_core_errors,
    check_tests,
)


def source_files(root: Path) -> Iterator[Path]:
    """Every file that the rules are about; build output and virtual environments are elsewhere."""
    for name in TOP_FOLDERS:
        for folder, folders, files in os.walk(root / name):
            folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and f[0] != ".")
            for file in sorted(files):
                path = Path(folder) / file
                if path.suffix in CODE | {".md", ".toml"} or file == "CMakeLists.txt":
                    yield path
    for name in ("CMakeLists.txt", "README.md", "ARCHITECTURE.md", "Makefile"):
        if (root / name).exists():
            yield root / name


def check_tree(root: Path, layers: Layers) -> list[str]:
    """Findings of every rule over every file, as "path:line: message"."""
    findings = []
    for path in source_files(root):
        relative = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        file = File(relative, text.splitlines(), layers)
        if text and not text.endswith("\n"):
            findings.append(f"{relative}:{len(file.lines)}: no newline at the end of the file")
        for rule in RULES:
            findings.extend(f"{relative}:{number}: {message}" for number, message in rule(file))
    return findings


def main(arguments: list[str]) -> int:
    """Checks the tree at the given root (default: this repository)."""
    here = Path(__file__).resolve().parent
    root = Path(arguments[0]) if arguments else here.parent
    findings = check_tree(root, Layers.load(here / "layers.toml"))
    for finding in findings:
        sys.stdout.write(finding + "\n")
    sys.stdout.write(f"tidy: {len(findings)} findings\n" if findings else "tidy: clean\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
