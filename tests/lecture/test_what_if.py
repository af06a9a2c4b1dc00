"""Knobs are turned for one measurement; a wrong one is one line; what the pages quote of a command it prints."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common import UserError
from scripts.lecture import what_if as program
from scripts.lecture.experiment import load
from scripts.lecture.what_if import constants, what_if
from tests.errors import check_names

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```console\n\$ (.*?)^```$", re.M | re.S)


def quoted(block: str) -> tuple[str, list[str]]:
    """(command, lines of its output): the command ends with the first line that closes its quotation marks."""
    lines = block.splitlines()
    for end in range(1, len(lines)):
        command = "\n".join(lines[:end])
        if command.count('"') % 2 == 0:
            return command, lines[end:]
    raise ValueError(f"no output: {block}")


QUOTED = [
    quoted(block)
    for page in sorted((ROOT / "docs/lecture").glob("*.md"))
    for block in BLOCK.findall(page.read_text(encoding="utf-8"))
]


def test_a_knob_is_turned_and_turned_back():
    own = load("pl").RATES
    outcome = what_if("pl", RATES=(0.1, 0.09))
    assert load("pl").RATES is own
    assert "f in the end at α = 0.1 / at α = 0.09: 1.2 (at least 2.5: does not hold)" in str(outcome)
    assert outcome.picture.startswith(b"\x89PNG")
    shown = outcome._repr_html_()
    assert shown.count("<tr>") == len(outcome.checks) and 'src="data:image/png;base64,iVBOR' in shown


def test_a_constant_gets_back_its_value_after_an_error():
    own = load("epsilon").LABELS
    with pytest.raises(UserError, match="LABELS={'adam': 'Adam'}: epsilon cannot be measured with it: KeyError"):
        what_if("epsilon", LABELS={"adam": "Adam"})
    assert load("epsilon").LABELS is own


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["noise"], ["experiment noise", "noise_ball"]),
        (["pl", "ALPHA=1"], ["ALPHA", "L, MU, RATES"]),
        (["qk_clip", "TAU=high"], ["TAU=high", "float", "10.0"]),
        (["pl", "0.1"], ["0.1", "NAME=VALUE"]),
    ],
)
def test_a_wrong_knob_is_one_line(words, parts, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["what_if.py", *words])
    with pytest.raises(SystemExit) as stop:
        program.main()
    check_names(str(stop.value), "error: ", *parts)


@pytest.mark.parametrize(("command", "output"), QUOTED, ids=[command.splitlines()[0][:70] for command, _ in QUOTED])
def test_a_solution_quotes_its_command(command, output):
    """Its knobs exist; under NANOMUON_SOAK=1 it is run, and prints every line that the page quotes."""
    words = shlex.split(command)
    assert words[0] == "python" and output
    if words[1] == "scripts/lecture/what_if.py":
        knobs = [word.partition("=")[0] for word in words[3:] if not word.startswith("--")]
        assert set(knobs) <= set(constants(words[2]))
    if os.environ.get("NANOMUON_SOAK") == "1":
        run = [sys.executable, *words[1:]]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        assert not set(output) - set(done.stdout.splitlines())
