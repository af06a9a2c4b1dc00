"""Sweeps that are large or oddly named, and comparisons without a target."""

from scripts.speedrun import groups, page, picture, table
from tests.scripts.compare_runs import lines, write_run


def test_many_groups_with_long_labels_are_drawn(tmp_path):
    """The picture grows with its legend."""
    found = [write_run(tmp_path / str(n), lines(optim=f"a_name_of_{n}_" + "x" * 65)) for n in range(17)]
    comparison = groups.compare(found)
    rows = table.build(comparison)
    assert picture.draw("title", "setting", comparison, rows, []).startswith(b"\x89PNG")


def test_a_spreadsheet_computes_no_cell(tmp_path):
    found = [write_run(tmp_path / str(n), lines(optim=name)) for n, name in enumerate(("=cmd|x", "+1+1", "@x", "-2"))]
    comparison = groups.compare(found)
    text = table.to_csv(comparison, table.build(comparison))
    assert {line.split(",")[0] for line in text.splitlines()[1:]} == {"'=cmd|x", "'+1+1", "'@x", "'-2"}


def test_without_a_target_nothing_is_said_of_speed(tmp_path):
    found = [write_run(tmp_path / f"{name}", lines(optim=name, target=None)) for name in "ab"]
    comparison = groups.compare(found, baseline="a")
    lead = page._lead(comparison, table.build(comparison), [])
    assert "without a target" in lead and "speed-up" not in lead
