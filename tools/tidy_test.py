#!/usr/bin/env python3
"""Each rule of tidy.py finds what it is for, and leaves alone what it is not for."""

from __future__ import annotations

import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import tidy  # noqa: E402

LAYERS = tidy.Layers(
    folders={
        "include/transfuse": {"uses": [], "headers": ["*"]},
        "src/base": {"uses": [], "headers": ["result"], "test_uses": ["src/plan"]},
        "src/plan": {"uses": ["src/base"], "headers": ["result", "plan"]},
        "src/transport/shm": {"uses": ["src/base"], "headers": ["transport"]},
        "apps": {"uses": ["src/base", "bench"], "headers": ["*"]},
        "bench": {"uses": ["*"], "headers": ["*"]},
    },
    limits={"header_lines": 5, "file_lines": 8, "test_lines": 12, "line_columns": 60},
    only={"grpc": ["src/rpc"]},
    exempt_length=frozenset(),
)


def messages(rule: object, path: str, text: str) -> list[str]:
    """What one rule says about one file."""
    assert callable(rule)
    return [message for _, message in rule(tidy.File(path, text.splitlines(), LAYERS))]


class Includes(unittest.TestCase):
    def test_a_lower_layer_may_be_included(self) -> None:
        text = '#include "base/log.h"\n#include "transfuse/plan.h"\n#include <vector>\n'
        self.assertEqual(messages(tidy.check_includes, "src/plan/cut.cc", text), [])

    def test_a_higher_layer_may_not_be_included(self) -> None:
        found = messages(tidy.check_includes, "src/base/log.cc", '#include "plan/cut.h"\n')
        self.assertIn("src/base may not include plan/cut.h", found[0])
        self.assertEqual(
            messages(tidy.check_includes, "src/base/log_test.cc", '#include "plan/cut.h"\n'), []
        )

    def test_a_public_header_of_another_layer_may_not_be_included(self) -> None:
        text = '#include "transfuse/transport.h"\n'
        self.assertEqual(len(messages(tidy.check_includes, "src/plan/cut.cc", text)), 1)

    def test_the_longest_folder_decides(self) -> None:
        text = '#include "transport/shm/wire.h"\n'
        self.assertEqual(messages(tidy.check_includes, "src/transport/shm/wire.cc", text), [])
        self.assertEqual(len(messages(tidy.check_includes, "src/plan/cut.cc", text)), 1)

    def test_a_short_include_is_found_in_the_core_and_allowed_in_apps(self) -> None:
        self.assertEqual(len(messages(tidy.check_includes, "src/plan/a.cc", '#include "a.h"')), 1)
        self.assertEqual(messages(tidy.check_includes, "apps/x/a.cc", '#include "a.h"'), [])

    def test_a_folder_that_is_not_declared_is_found(self) -> None:
        self.assertEqual(len(messages(tidy.check_includes, "src/new/a.cc", "")), 1)

    def test_a_third_party_library_is_seen_in_its_own_folder_only(self) -> None:
        text = "#include <grpcpp/grpcpp.h>\n"
        self.assertEqual(len(messages(tidy.check_only, "src/plan/a.cc", text)), 1)
        self.assertEqual(messages(tidy.check_only, "src/rpc/a.cc", text), [])


class Shape(unittest.TestCase):
    def test_a_long_file_and_a_long_line_are_found(self) -> None:
        self.assertEqual(len(messages(tidy.check_size, "src/base/a.cc", "x\n" * 9)), 1)
        self.assertEqual(messages(tidy.check_size, "src/base/a_test.cc", "x\n" * 9), [])
        self.assertEqual(len(messages(tidy.check_size, "include/transfuse/a.h", "x\n" * 6)), 1)
        self.assertEqual(len(messages(tidy.check_size, "src/base/a.cc", "y" * 61)), 1)

    def test_a_file_without_a_sentence_at_its_head_is_found(self) -> None:
        self.assertEqual(len(messages(tidy.check_head, "src/base/a.cc", "#include <x>\n")), 1)
        self.assertEqual(messages(tidy.check_head, "src/base/a.cc", "// Adds numbers.\n"), [])
        self.assertEqual(messages(tidy.check_head, "a.py", '#!/usr/bin/x\n"""Adds."""\n'), [])
        self.assertEqual(len(messages(tidy.check_head, "a.py", "import os\n")), 1)

    def test_unfinished_work_and_loose_text_are_found(self) -> None:
        self.assertEqual(len(messages(tidy.check_text, "src/a.cc", "// TO" + "DO: later\n")), 1)
        self.assertEqual(len(messages(tidy.check_text, "src/a.cc", "x  \n")), 1)
        self.assertEqual(len(messages(tidy.check_text, "src/a.cc", "\tx\n")), 1)
        self.assertEqual(len(messages(tidy.check_text, "src/a.h", "int x;\n")), 1)
        self.assertEqual(messages(tidy.check_text, "src/a.h", "#pragma once\n"), [])


class Names(unittest.TestCase):
    def test_short_forms_of_source_and_target_are_found(self) -> None:
        to, of = "d" + "st", "s" + "rc"
        for line in (f"int {of} = 0;", f"copy({to});", f"{to}_offset += 1;", f"my_{of};"):
            self.assertEqual(len(messages(tidy.check_names, "src/a.cc", line)), 1, line)

    def test_the_source_folder_may_be_named(self) -> None:
        for line in ('#include "src/a.h"', "// see src/plan/cut.cc", 'root / "src"'):
            self.assertEqual(messages(tidy.check_names, "src/a.cc", line), [], line)

    def test_classes_named_by_a_pattern_are_found(self) -> None:
        self.assertEqual(len(messages(tidy.check_names, "src/a.h", "class Plan" + "Manager {")), 1)
        self.assertEqual(messages(tidy.check_names, "src/a.h", "class Plan {"), [])

    def test_throw_and_bare_mutexes_are_found_in_the_core_only(self) -> None:
        self.assertEqual(len(messages(tidy.check_core_errors, "src/a.cc", "throw 1;")), 1)
        self.assertEqual(len(messages(tidy.check_core_errors, "src/a.cc", "std::mutex m;")), 1)
        self.assertEqual(messages(tidy.check_core_errors, "src/a.cc", "// may throw"), [])
        self.assertEqual(messages(tidy.check_core_errors, "python/a.cc", "throw 1;"), [])

    def test_names_of_tests_must_be_sentences(self) -> None:
        for name in ("Basic", "Works", "Test1", "Empty"):
            text = f"TEST(Lower, {name}) {{"
            self.assertEqual(len(messages(tidy.check_tests, "src/a_test.cc", text)), 1, name)
        for name in ("MergesRowsThatTouch", "I1_LastRankKeepsItsOwnExtent"):
            text = f"TEST(Lower, {name}) {{"
            self.assertEqual(messages(tidy.check_tests, "src/a_test.cc", text), [], name)


class Tree(unittest.TestCase):
    def test_findings_name_path_and_line_and_the_exit_code_says_so(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "src" / "base" / "a.cc"
            file.parent.mkdir(parents=True)
            file.write_text('// Adds numbers.\n#include "plan/cut.h"')
            found = tidy.check_tree(Path(folder), LAYERS)
            self.assertTrue(found[0].startswith("src/base/a.cc:2: no newline"), found)
            self.assertTrue(found[1].startswith("src/base/a.cc:2: src/base may not"), found)
            self.assertEqual(tidy.main([folder]), 1)
            file.write_text("// Adds numbers.\n")
            self.assertEqual(tidy.main([folder]), 0)


if __name__ == "__main__":
    unittest.main()
