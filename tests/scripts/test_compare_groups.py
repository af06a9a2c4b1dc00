"""Which runs stand beside each other, and what may be claimed of them."""

import json
import math

import pytest

from scripts.speedrun import groups, records, statistics, table
from scripts.speedrun.claims import claims, scope
from scripts.speedrun.page import legend
from tests.errors import raises_naming
from tests.scripts.compare_runs import lines, write_run, write_runs
from trainer.metrics.identity import model_hash


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": None}, "no target"),
        ({"target": 3.5}, "target is 3.5, the others' 3"),
        ({"model": "big"}, "model is big, the others' tiny"),
        ({"data": "other"}, "data is other, the others' sample"),
        ({"batch_tokens": 2048}, "batch_tokens is 2,048, the others' 1,024"),
        ({"model_hash": "1f"}, "model_hash is 1f"),
        ({"data_hash": "2e"}, "data_hash is 2e"),
        ({"precision": "bfloat16"}, "precision is bfloat16"),
        ({"seq_len": 64}, "seq_len is 64, the others' unknown"),
        ({"steps": 301}, "stopped early, at step 300 of 301"),
        ({"seed": 1}, "seed 1 of a is there already"),
        ({"losses": (5.0, 4.0, float("nan"), 2.9)}, "diverged: the validation loss at step 200"),
        ({"losses": (5.0, 4.0, None, 2.9)}, "diverged: the validation loss at step 200"),
    ],
)
def test_what_differs_is_set_aside_not_mixed(tmp_path, change, reason):
    whole = write_runs(tmp_path, "a", [2.9, 2.8])
    odd = write_run(tmp_path / "odd", lines(**{"optim": "a", "seed": 3, **change}))
    comparison = groups.compare([*whole, odd])
    assert [run.seed for group in comparison.groups for run in group.runs] == [1, 2]
    assert len(comparison.aside) == 1 and reason in "; ".join(comparison.aside[0][1])


def test_end_without_evaluation_is_set_aside(tmp_path):
    run = write_run(tmp_path, [*lines()[:4], '{"step": 300, "tokens": 307200, "train_time_s": 30, "train/loss": 2.8}'])
    assert groups.compare([run]).aside[0][1] == ["not evaluated at its end: last at step 200 of 300"]


@pytest.mark.parametrize("last", ['"train/loss": null', '"train/loss": 3, "grad_norm": null', '"train/loss": NaN'])
def test_a_run_that_training_broke_has_diverged(tmp_path, last):
    """The trainer stops such a run before its next evaluation: it has not merely been stopped."""
    end = f'{{"step": 150, "tokens": 1, "train_time_s": 15, {last}}}'
    broken = write_run(tmp_path / "x", [*lines(seed=2)[:3], end])
    comparison = groups.compare([*write_runs(tmp_path, "a", [2.9]), broken])
    assert comparison.aside[0][1] == [
        "diverged: its loss or gradient is not a finite number when it stops, at step 150"
    ]
    assert comparison.groups[0].diverged == 1


def test_the_baseline_decides_which_setting_is_compared(tmp_path):
    found = [*write_runs(tmp_path, "a", [2.9, 2.8, 2.7]), *write_runs(tmp_path, "b", [2.9], model="big")]
    assert groups.compare(found).setting["model"] == "tiny"
    assert groups.compare(found, baseline="b").setting["model"] == "big"
    with raises_naming(groups.ComparisonError, "--baseline c", "here: a"):
        groups.compare(found, baseline="c")


def test_a_target_on_the_command_line_replaces_the_recorded_ones(tmp_path):
    found = [*write_runs(tmp_path, "a", [2.9]), *write_runs(tmp_path, "b", [2.9], target=None)]
    assert len(groups.compare(found).aside) == 1
    comparison = groups.compare(found, target=3.5)
    assert comparison.target == 3.5 and comparison.aside == []


def test_different_lengths_are_different_groups(tmp_path):
    long = write_run(tmp_path / "long", lines((5, 4, 3, 2.9, 2.8), seed=2, steps=400))
    found = [*write_runs(tmp_path, "a", [2.9]), long]
    assert [group.label for group in groups.compare(found).groups] == ["a (300 steps)", "a (400 steps)"]


def test_a_group_in_the_header_goes_before_the_optimizer(tmp_path):
    other = write_run(tmp_path / "b", lines(optim="b", seed=2, group="g"))
    found = [*write_runs(tmp_path, "a", [2.9], group="g"), other]
    assert [(group.label, len(group.runs)) for group in groups.compare(found).groups] == [("g", 2)]


def test_the_mean_curve_uses_the_steps_that_all_seeds_share(tmp_path):
    dense = lines(seed=2)
    dense.insert(2, '{"step": 50, "tokens": 51200, "train_time_s": 6, "val/loss": 4.5}')
    found = [write_run(tmp_path / "a", lines((7, 5, 3.4, 2.7))), write_run(tmp_path / "b", dense)]
    curve = groups.compare(found).groups[0].curve()
    assert curve["steps"] == [0, 100, 200, 300]
    assert curve["mean"] == [6, 4.5, pytest.approx(3.3), pytest.approx(2.8)]
    assert (curve["low"], curve["high"]) == ([5, 4, 3.2, 2.7], [7, 5, 3.4, 2.9])


def test_the_mean_of_another_metric_is_over_the_seeds_that_record_it(tmp_path):
    def with_other(seed: int, values: dict[int, object]) -> records.Run:
        more = [json.dumps({"step": 200 + step, "tokens": step, "train_time_s": step, "val/other": value})
                for step, value in values.items()]  # fmt: skip
        *before, last = lines(seed=seed)
        return write_run(tmp_path / str(seed), [*before, *more, last])

    found = [with_other(1, {10: 1, 20: 2, 30: None}), with_other(2, {10: 3, 30: 4}), with_other(3, {})]
    curve = groups.compare(found).groups[0].curve("val/other")
    assert curve["steps"] == [210, 230]
    assert [curve[name][0] for name in ("mean", "low", "high")] == [2, 1, 3]
    assert all(math.isnan(curve[name][1]) for name in ("mean", "low", "high"))


def said(found: list[records.Run], label: str, sigma=None, loss_per_step=0.0, **options) -> list[tuple[bool, str]]:
    comparison = groups.compare(found, **options)
    rows = table.build(comparison, sigma, loss_per_step)
    return [(c.shown, c.text) for c in claims(comparison, rows, sigma, loss_per_step) if c.label == label]


def test_one_seed_claims_nothing(tmp_path):
    found = [*write_runs(tmp_path, "a", [2.7]), *write_runs(tmp_path, "b", [2.9])]
    sentences = said(found, "a", baseline="b")
    assert len(sentences) == 4 and not any(shown for shown, _ in sentences)
    assert "One seed says nothing about the next" in sentences[0][1]


def test_one_seed_may_pass_with_a_known_sigma(tmp_path):
    sentences = said(write_runs(tmp_path, "a", [2.995]), "a", sigma=0.0013)
    assert sentences == [
        (True, "Final loss below 3 if σ is 0.0013: z = 3.85 ≥ 3.08 (one-sided p < 0.0001), n = 1."),
        (True, "Below 3 at step 300, evaluated by all seeds: mean 2.9950, n = 1, z = 3.85."),
    ]


def test_a_seed_that_misses_the_target_leaves_its_cost_unknown(tmp_path):
    found = [*write_runs(tmp_path, "a", [2.7, 2.71, 3.1]), *write_runs(tmp_path, "b", [2.9, 2.91, 2.92])]
    comparison = groups.compare(found, baseline="b")
    row = next(row for row in table.build(comparison) if row.label == "a")
    assert row.reached == 2 and row.interpolated["steps"] is None and row.speedup["steps"] is None
    assert (False, "Speed-up over b: 2 of 3 seeds of a reached 3, so its cost to the target is not known.") in said(
        found, "a", baseline="b"
    )


def test_diverged_seeds_withhold_every_claim(tmp_path):
    found = [*write_runs(tmp_path, "a", [2.7, 2.71, float("nan")]), *write_runs(tmp_path, "b", [2.9, 2.91, 2.92])]
    text = "Nothing may be claimed: 1 of 3 seeds of a diverged, and the others do not stand for it."
    assert said(found, "a", baseline="b") == [(False, text)]
    assert (False, text) in said(found, "b", baseline="a")


def test_seconds_are_not_compared_between_devices(tmp_path):
    found = [*write_runs(tmp_path, "a", [2.7, 2.71], device="H100"), *write_runs(tmp_path, "b", [2.9, 2.91])]
    row = next(row for row in table.build(groups.compare(found, baseline="b")) if row.label == "a")
    assert row.speedup["seconds"] is None and row.speedup["steps"].low is not None
    assert (False, "Training time against b: the runs used different devices (H100, cpu).") in said(
        found, "a", baseline="b"
    )


def test_final_losses_of_different_lengths_need_a_price_of_a_step(tmp_path):
    short = [write_run(tmp_path / f"s{i}", lines((5, 4, 2.90 + i / 100), optim="a", seed=i, steps=200)) for i in (1, 2)]
    found = [*short, *write_runs(tmp_path, "b", [2.91, 2.92])]
    texts = [text for _, text in said(found, "a", baseline="b")]
    assert "Final loss against b: 200 and 300 steps of training are not the same budget." in texts
    assert not any("Welch" in text for text in texts)
    priced = [text for _, text in said(found, "a", 0.01, 4.5e-5, baseline="b")]
    assert any("Better than b if σ is 0.01: z = 0.45 <" in text for text in priced)


def test_seeds_without_spread_are_suspected_not_tested(tmp_path):
    found = [*write_runs(tmp_path, "a", [2.7, 2.7, 2.7]), *write_runs(tmp_path, "b", [2.9, 2.9, 2.9])]
    sentences = said(found, "a", baseline="b")
    assert not any(shown for shown, _ in sentences)
    assert "Does the seed reach the run?" in sentences[0][1]


def test_an_interval_that_holds_one_shows_nothing(tmp_path):
    found = [*write_runs(tmp_path, "a", [2.7, 2.9, 2.8]), *write_runs(tmp_path, "b", [2.71, 2.88, 2.8])]
    steps = next(s for s in said(found, "a", baseline="b") if "in steps" in s[1])
    assert not steps[0] and steps[1].endswith("the interval contains 1.")


def test_statistics_reach_the_table(tmp_path):
    found = [
        *write_runs(tmp_path, "a", [2.7, 2.72, 2.75]),
        *write_runs(tmp_path, "b", [2.9, 2.91, 2.93]),
        *write_runs(tmp_path, "c", [2.8, 2.9]),
    ]
    rows = {row.label: row for row in table.build(groups.compare(found, baseline="b"))}
    assert rows["a"].p_baseline == statistics.differ([2.7, 2.72, 2.75], [2.9, 2.91, 2.93])
    assert rows["a"].p_holm == 2 * rows["a"].p_baseline and rows["c"].p_holm == rows["c"].p_baseline
    assert rows["a"].p_target == statistics.below_target([2.7, 2.72, 2.75], 3.0)
    costs = {label: [200 + 100 * 0.2 / (3.2 - final) for final in finals]
             for label, finals in (("a", (2.7, 2.72, 2.75)), ("b", (2.9, 2.91, 2.93)))}  # fmt: skip
    expected = statistics.speedup(costs["b"], costs["a"])
    assert rows["a"].speedup["steps"].low == pytest.approx(expected.low, rel=1e-9)


def model(defaults, **chosen):
    """What a header says of a model."""
    return {"model_hash": model_hash(defaults | chosen), "model_settings": chosen, "model_defaults": defaults}


PLAIN = model({"bias": False, "norm": "rms"}, width=8)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (model({"bias": False, "norm": "rms", "cap": None, "eps": 1e-6}, width=8), None),
        ({"model_hash": model_hash({"bias": False, "width": 8})}, None),  # from before there was norm, or a dictionary
        (PLAIN | {"model_hash": "1f"}, None),
        (model({"bias": False, "norm": "rms"}, width=8, cap=3), "model.cap is 3, the others' unknown"),
        (model({"bias": False}, width=8, norm="layer"), "model.norm is layer, the others' rms"),
        (model({"bias": True, "norm": "rms"}, width=8), "model.bias is True, the others' False"),
        ({"model_hash": model_hash({"bias": False, "width": 9})}, "model_hash is"),
        ({"model_hash": ["x"], "model_settings": 3, "model_defaults": None}, "model_hash is"),
    ],
)
def test_a_model_is_the_same_where_its_class_has_more_settings_now(tmp_path, other, reason):
    """A setting that the older record does not know has its default in the newer one."""
    whole = write_runs(tmp_path, "a", [2.9, 2.8], **PLAIN)
    odd = write_run(tmp_path / "odd", lines(optim="a", seed=3, **other))
    comparison = groups.compare([odd, *whole])
    assert len(comparison.groups[0].runs) == (2 if reason else 3)
    assert [reason in "; ".join(reasons) for _, reasons in comparison.aside] == ([True] if reason else [])


def with_init(tmp_path, label, value, seeds=2, **settings):
    header = model({"init": "fan_in", "bias": False}, **({"init": value} if value else {}), **settings)
    return write_runs(tmp_path, label, [2.9, 2.8, 2.85][:seeds], **header)


def test_models_may_differ_in_the_settings_that_are_named(tmp_path):
    """And in no other; within a group they are one model."""
    plain, odd = with_init(tmp_path, "a", None), with_init(tmp_path, "b", "zero")
    wide, mixed = with_init(tmp_path, "c", "zero", width=9), with_init(tmp_path, "b", None, seeds=3)[2:]
    comparison = groups.compare([*plain, *odd, *wide, *mixed], baseline="a", across=["model.init"])
    assert {group.label: len(group.runs) for group in comparison.groups} == {"a": 2, "b": 2}
    assert comparison.across == {"model.init": {"a": "fan_in", "b": "zero"}}
    reasons = {(run.label, run.seed): said for run, said in comparison.aside}
    assert reasons["b", 3] == ["model.init is fan_in, the others' zero"]
    assert all("model.width is 9" in " ".join(reasons["c", seed]) for seed in (1, 2))
    rows = table.build(comparison)
    assert [row.pairs.n for row in rows if row.pairs] == [2], "they are compared, in pairs too"
    assert "The models differ in model.init: fan_in of a; zero of b." in legend(comparison, rows)
    assert "where models differ in model.init," in scope(comparison)
    apart = groups.compare([*plain, *odd], baseline="a")
    assert [group.label for group in apart.groups] == ["a"] and apart.across == {}


def test_a_setting_in_which_no_models_differ_is_an_error(tmp_path):
    found = [*with_init(tmp_path, "a", None), *with_init(tmp_path, "b", "zero")]
    with raises_naming(groups.ComparisonError, "--across model.inti", "model.init"):
        groups.compare(found, across=["model.init", "model.inti"])
    with raises_naming(groups.ComparisonError, "--across model.init", "none"):
        groups.compare(found[:2], across=["model.init"])


def test_a_run_goes_on_where_its_model_has_more_settings_now(tmp_path):
    first, *rest = lines(model_hash=model_hash({"width": 8}))
    for header, faults in ((PLAIN, 0), (model({"bias": False}, width=9), 1)):
        again = json.dumps({"run": json.loads(first)["run"] | header})
        assert len(write_run(tmp_path, [first, *rest[:2], again, *rest[2:]]).errors) == faults
