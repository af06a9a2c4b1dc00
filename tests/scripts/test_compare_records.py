"""Which lines of a record count, which are faults, and what is said of them."""

import json
import math

import pytest

from scripts.speedrun import groups, records
from tests.scripts.compare_runs import HEADER, lines, write_run


def test_a_clean_record(tmp_path):
    run = write_run(tmp_path, [*lines()[:2], '{"event": "saved"}', '{"step": 50, "train/loss": 4.4}', *lines()[2:]])
    assert (run.errors, run.warnings) == ([], [])
    assert run.steps == [0, 100, 200, 300] and run.losses == [5.0, 4.0, 3.2, 2.9]
    assert run.seconds == [0, 10, 20, 30] and run.tokens[-1] == 307200


@pytest.mark.parametrize(
    ("edit", "line", "text"),
    [
        (lambda x: [*x[:2], x[2][:20], *x[3:]], 3, "not valid JSON"),
        (lambda x: [*x[:2], "[1, 2]", *x[2:]], 3, "list where an object"),
        (lambda x: [*x[:2], '{"loss": 1}', *x[2:]], 3, "neither step, run nor event"),
        (lambda x: [*x[:2], '{"step": "7"}', *x[2:]], 3, "step is '7'"),
        (lambda x: [*x[:2], '{"step": 1.5}', *x[2:]], 3, "step is 1.5"),
        (lambda x: [*x, '{"step": 400, "a": ' + "[" * 100_000 + "]" * 100_000 + "}"], 6, "not valid JSON"),
        (lambda x: [*x, '{"step": 1' + "0" * 400 + "}"], 6, "step is 1000"),
        (lambda x: [*x, '{"step": 400, "tokens": 1' + "0" * 5000 + "}"], 6, "not valid JSON"),
        (lambda x: [*x[:-1], '{"step": 300, "val/loss": 2, "tokens": 1e6}'], 5, "without a usable train_time_s"),
        (lambda x: [*x[:-1], '{"step": 300, "val/loss": "2", "tokens": 1e6, "train_time_s": 9}'], 5, "val/loss is '2'"),
        (lambda x: [*x[:-1], '{"step": 300, "val/loss": 2, "tokens": 9, "train_time_s": 3}'], 5, "falls from 20 to 3"),
        (lambda x: [*x, '{"step": 400, "val/loss": 2, "tokens": 1e6, "train_time_s": 9}'], 6, "beyond the run's 300"),
        (lambda x: [*x, json.dumps({"run": {**HEADER, "seed": 2}})], 6, "second run in the same record: seed"),
        (lambda x: [json.dumps({"run": {**HEADER, "steps": "many"}}), *x[1:]], 1, "header steps is 'many'"),
        (lambda x: [json.dumps({"run": {**HEADER, "target": "low"}}), *x[1:]], 1, "header target is 'low'"),
        (lambda x: x[1:], None, "no header line"),
        (lambda x: [json.dumps({"run": {"optim": "a", "steps": 300}}), *x[1:]], None, "header lacks model, data, seed"),
        (lambda x: x[:1], None, "no validation loss"),
        (lambda x: b"", None, "no validation loss"),
        (lambda x: b"\xff\xfe\n" + "\n".join(x).encode() + b"\n", 1, "not valid JSON"),
    ],
)
def test_faults_flag_the_run_and_set_it_aside(tmp_path, edit, line, text):
    run = write_run(tmp_path / "bad", edit(lines()))
    assert any(number == line and text in said for number, said in run.errors), run.errors
    good = write_run(tmp_path / "good", lines(seed=9))
    comparison = groups.compare([run, good])
    assert [run for run, _ in comparison.aside] == [run]
    assert [group.runs for group in comparison.groups] == [[good]]


def test_marks_cost_nothing(tmp_path):
    """A byte-order mark, at the beginning or where files were joined, and U+2028, which ends no line."""
    sound = lines(label="a\u2028b")
    run = write_run(tmp_path, "\n".join(["\ufeff" + sound[0], *sound[1:-1], "\ufeff" + sound[-1]]).encode() + b"\n")
    assert (run.errors, run.steps, run.header["label"]) == ([], [0, 100, 200, 300], "a\u2028b")


def test_torn_last_line_and_empty_lines_are_only_warnings(tmp_path):
    whole = "\n".join([*lines()[:3], "", *lines()[3:]]).encode() + b"\n"
    run = write_run(tmp_path, whole + b'{"step": 301, "tok')
    assert run.errors == [] and [line for line, _ in run.warnings] == [4, 7]
    assert run.steps == [0, 100, 200, 300]
    ended = write_run(tmp_path, whole + b'{"step": 301, "tok\n')  # with its newline it was written whole, and is broken
    assert [line for line, _ in ended.errors] == [7]


def test_a_last_line_without_newline_counts_if_it_is_whole(tmp_path):
    run = write_run(tmp_path, "\n".join(lines()).encode())
    assert run.steps[-1] == 300 and not run.errors and not run.warnings


def test_after_a_resume_the_later_lines_count(tmp_path):
    x = lines()
    before = json.dumps({"step": 300, "tokens": 307200, "train_time_s": 31, "val/loss": 9.9})
    again = [x[0], '{"event": "resumed"}', '{"step": 150, "train/loss": 4}', x[3], x[4]]
    run = write_run(tmp_path, [*x[:4], before, *again])
    assert run.losses == [5.0, 4.0, 3.2, 2.9] and not run.errors
    assert [line for line, _ in run.warnings] == [8]


def test_a_resumed_run_is_not_ahead_of_itself(tmp_path):
    """Killed after step 300, resumed from 200, now at 250: what it had measured at 300 is no longer its own."""
    run = write_run(tmp_path, [*lines(), '{"event": "resumed"}', '{"step": 250, "train/loss": 3}'])
    assert run.steps == [0, 100, 200] and run.last_step == 250
    assert groups.compare([run]).aside[0][1] == ["stopped early, at step 250 of 300"]


def test_records_are_found_once_and_named_without_the_machine(tmp_path):
    for name in ("sweep/b", "sweep/a/deeper"):
        write_run(tmp_path / name, lines())
    found = records.find_records([tmp_path / "sweep", tmp_path / "sweep/a/../b", tmp_path / "sweep/b/metrics.jsonl"])
    assert [shown for _, shown in found] == ["sweep/a/deeper/metrics.jsonl", "sweep/b/metrics.jsonl"]


def test_every_number_of_a_line_becomes_a_curve(tmp_path):
    x = lines()
    x[2:2] = ['{"step": 50, "tokens": 5, "train_time_s": 5, "train/loss": 4.4, "val/other": 7, "on": true, "x": "a"}']
    x[4:4] = ['{"step": 110, "tokens": 11, "train_time_s": 11, "val/other": null}', '{"step": 120, "val/other": 1}']
    run = write_run(tmp_path, x)
    assert (run.errors, run.warnings, set(run.curves)) == ([], [], {"val/loss", "train/loss", "val/other"})
    other = run.curves["val/other"]
    assert (other.steps, other.tokens, other.seconds) == ([50, 110], [5, 11], [5, 11])  # 120 has no place on the axes
    assert other.values[0] == 7 and math.isnan(other.values[1])


def test_after_a_resume_the_later_values_of_every_metric_count(tmp_path):
    clock = '"tokens": 1, "train_time_s": 1'
    run = write_run(tmp_path, [lines()[0], *(f'{{"step": {step}, {clock}, "grad_norm": {value}}}'
               for step, value in ((10, 1), (20, 2), (30, 3), (20, 4), (25, 5), (25, 6)))])  # fmt: skip
    assert run.curves["grad_norm"].steps == [10, 20, 25] and run.curves["grad_norm"].values == [1, 4, 6]
