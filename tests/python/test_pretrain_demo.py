"""The pre-training demo, tiny: real trainers, a real kill, results that can be read."""

from __future__ import annotations

import json
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from demo_process import COMMAND, interrupt
from transfuse.demo import __main__ as command
from transfuse.demo.pretrain.text import Tokenizer, read_corpus

TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
PRETRAIN = [*COMMAND, "--pretrain", "--text", str(TEXT)]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    result = subprocess.run(
        [*PRETRAIN, "--out", str(out)], check=False, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


def test_the_engine_ends_with_the_trainers_bits(tiny_run):
    out, text = tiny_run
    verdict = json.loads((out / "report.json").read_text())["verdict"]
    assert verdict["logits_equal"] is True
    assert verdict["logits_differing"] == 0
    assert verdict["logits_of_other_weights_differ"] > 0
    assert verdict["parameters_equal"] == verdict["parameters_compared"] > 20
    assert "equal, bit for bit" in text


def test_the_killed_engine_came_back_and_the_run_went_on(tiny_run):
    out, text = tiny_run
    report = json.loads((out / "report.json").read_text())
    assert report["collectives"] == "gloo"
    assert "2 FSDP2 trainers, over gloo, hold " in text
    killed, back = report["events"]
    assert (killed["what"], back["what"]) == ("killed", "back")
    assert killed["pid"] != back["pid"]
    after = [row for row in report["steps"] if row["step"] >= back["step"] and "version" in row]
    assert after
    assert all(row["verified"] for row in after)
    assert report["verdict"]["version"] == report["steps"][-1]["published"]


def test_every_refit_is_read_by_mapping_and_has_its_phases(tiny_run):
    out, _ = tiny_run
    refits = [r for r in json.loads((out / "report.json").read_text())["steps"] if "version" in r]
    for row in refits:
        assert row["version"] == row["published"]
        assert row["routes"] == ["memfd"]
        assert row["phases_us"]["transfer"] > 0
        assert row["memcpy_gbps"] > 0


def test_pictures_and_samples_are_written(tiny_run):
    out, _ = tiny_run
    for name in ("loss.png", "refit_phases.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(out / "plan.svg").getroot().tag.endswith("svg")
    assert "version" in (out / "samples.txt").read_text()


def test_an_interrupted_run_leaves_no_process(tmp_path):
    run = [*PRETRAIN, "--out", str(tmp_path / "out")]
    assert interrupt(run, tmp_path / "log", at_least=3) == (command.EXIT_INTERRUPTED, [])


def test_text_that_is_too_short_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(FileNotFoundError, match="--text"):
        read_corpus(tmp_path / "short.txt")


def test_the_tokenizer_gives_back_what_it_was_given():
    corpus = read_corpus(TEXT)
    tokenizer = Tokenizer(corpus, 400)
    assert tokenizer.decode(tokenizer.encode(corpus[:2000])) == corpus[:2000]
    strange = "Zürich 東京 \x00"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    assert max(tokenizer.encode(corpus)) < 400


@pytest.mark.parametrize("arguments", [["--steps", "1"], ["--steps", "x"], ["--nonsense"]])
def test_wrong_usage_has_its_exit_code(arguments):
    with pytest.raises(SystemExit) as caught:
        command.parse(arguments)
    assert caught.value.code == command.EXIT_USAGE
