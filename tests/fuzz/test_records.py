"""Records with lines that are nearly right: the comparison reads what is sound and says what is not.

``make soak`` draws five hundred.
"""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.speedrun import claims, groups, page, records, report, table
from tests.fuzz.mutations import mutated
from tests.scripts.compare_runs import lines, write_run
from trainer.metrics.jsonl import read_lines
from trainer.metrics.summary import summary

EXAMPLES = 500 if "NANOMUON_SOAK" in os.environ else 60
JUNK = [b"", b"\0\0\0", b"\xff\xfe", b"[" * 20_000, b"{" * 20_000, b'{"step": 1e999}', b'{"step": 100,', b"3"]
JUNK += [
    b'{"step": NaN}',
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf{}",
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"step": 1, "step": 2}',
]
SOUND = [json.loads(line) for line in lines(label="=cmd()", group="a\u2028b")]


@pytest.mark.slow
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_the_comparison_survives_and_keeps_what_is_sound(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("runs")
    changed = [json.dumps(data.draw(mutated(line) | st.just(line))).encode() for line in SOUND]
    for place in data.draw(st.lists(st.integers(0, len(changed)), max_size=3)):
        changed.insert(place, data.draw(st.sampled_from(JUNK) | st.binary(max_size=8)))
    odd = write_run(root / "odd", b"\n".join(changed) + data.draw(st.sampled_from([b"\n", b"", b"\0", b"\n\n"])))
    whole = [write_run(root / f"whole-{seed}", lines(seed=seed, optim="b")) for seed in (1, 2, 3)]
    summary(read_lines(root / "odd" / "metrics.jsonl"), None)
    try:
        comparison = groups.compare([odd, *whole], None, None)
    except groups.ComparisonError as error:
        assert "\n" not in str(error)
        return
    rows = table.build(comparison, None, 0.0)
    assert any(row.label == "b" and row.final.n == 3 for row in rows), "sound runs stay whatever stands beside them"
    sentences = claims.claims(comparison, rows, None, 0.0)
    notes = [f"{line}: {text}" for line, text in odd.warnings]
    drawn = page.render("t", comparison, rows, sentences, [], notes)
    told = report.to_markdown("t", comparison, rows, sentences, notes) + table.to_csv(comparison, rows)
    assert not any(cell.startswith(("=", "+", "@")) for cell in told.replace("\n", ",").split(","))
    assert drawn.count("<script") == drawn.count("</script")


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(st.lists(st.sampled_from(JUNK) | st.binary(max_size=20), max_size=4), st.integers(0, 4))
def test_lines_between_junk_are_all_read(tmp_path_factory, junk, place):
    path = tmp_path_factory.mktemp("record") / "metrics.jsonl"
    sound = [json.dumps(line).encode() for line in SOUND]
    junk = [line.replace(b"\n", b" ") for line in junk]
    path.write_bytes(b"\n".join(sound[:place] + junk + sound[place:]) + b"\n")
    found = read_lines(path)
    assert [line for line in found if line in SOUND] == SOUND[1:]
    assert records.read_run(path, "x/metrics.jsonl").losses is not None
