"""Says in plain sentences what the runs show and what they do not; every sentence names its test, its p or interval and its n."""

from dataclasses import dataclass

from .groups import Comparison
from .records import SETTING
from .statistics import ALPHA, CONFIDENCE, Z_LIMIT, Ratio, z_pvalue
from .table import Row, interval, pvalue


@dataclass(frozen=True)
class Claim:
    """A sentence about one group; `shown` tells whether the runs support it."""

    label: str
    shown: bool
    text: str


def claims(
    comparison: Comparison, rows: list[Row], sigma: float | None = None, loss_per_step: float = 0
) -> list[Claim]:
    """All sentences, in the order of the rows; about a group with diverged seeds there is only the one that says so."""
    reference = next((row for row in rows if row.group is comparison.baseline), None)
    found = []
    for row in rows:
        label, runs = row.group.label, len(row.group.runs)
        if row.group.diverged:
            found.append(
                Claim(
                    label,
                    False,
                    f"{row.group.diverged} of {runs + row.group.diverged} seeds diverged: the others "
                    "do not stand for this optimizer, so nothing may be claimed for it.",
                )
            )
            continue
        if comparison.target is not None:
            found += [Claim(label, *claim) for claim in _against_target(row, comparison.target, sigma)]
        if reference is None or row is reference:
            continue
        if reference.group.diverged:
            found.append(
                Claim(
                    label,
                    False,
                    f"Nothing may be claimed over {reference.group.label}: seeds of it diverged.",
                )
            )
            continue
        if comparison.target is not None:
            found += [Claim(label, *claim) for claim in _speed(row, reference, comparison.target)]
        found += [Claim(label, *claim) for claim in _loss(row, reference, sigma, loss_per_step)]
    return found


def scope(comparison: Comparison) -> str:
    """The limits of all the sentences together."""
    known = ", ".join(
        f"{key.replace('_', ' ')} {comparison.setting[key]}" for key in SETTING if comparison.setting[key]
    )
    return (
        f"All of this holds for {known or 'this setting'} and for nothing else. n counts seeds; the intervals and tests "
        "cover the spread over seeds only. Whether every optimizer was tuned with the same care is not in the records: "
        "a lead over an untuned baseline is worth nothing."
    )


def _against_target(row: Row, target: float, sigma: float | None) -> list[tuple[bool, str]]:
    n, mean = row.final.n, f"{row.final.mean:.4f}"
    found = []
    if row.p_target is not None:
        shown = row.p_target < ALPHA
        limit = "" if shown else f", not below {ALPHA:g}"
        found.append(
            (
                shown,
                f"Final loss below {target:g}: mean {mean}, one-sample t-test p {_equals(row.p_target)}{limit}, n = {n}.",
            )
        )
    elif n == 1 and not sigma:
        side = "below" if row.final.mean < target else "not below"
        found.append(
            (
                False,
                f"One run ended at {mean}, {side} {target:g}. One run has no test: it is an observation, "
                "not evidence that the next seed would do the same.",
            )
        )
    elif n > 1:
        found.append(
            (
                False,
                f"All {n} seeds ended at exactly {mean}: no spread, no test. Does the seed reach the run?",
            )
        )
    if row.z_target is not None:
        found.append(
            (
                row.z_target >= Z_LIMIT,
                f"Final loss below {target:g} if σ is {sigma:g}: {_known(row.z_target)}, n = {n}.",
            )
        )
    return found


def _speed(row: Row, reference: Row, target: float) -> list[tuple[bool, str]]:
    name = reference.group.label
    for side in (row, reference):
        if side.reached < side.final.n:
            return [
                (
                    False,
                    f"Speed-up over {name}: {side.reached} of {side.final.n} seeds of {side.group.label} reached "
                    f"{target:g}, so its cost to the target is not known.",
                )
            ]
    found = [_ratio(row.speedup["steps"], "steps", row, reference, target)]
    if row.same_device:
        found.append(_ratio(row.speedup["seconds"], "training time", row, reference, target))
    else:
        devices = ", ".join(sorted(str(device) for device in row.group.devices | reference.group.devices))
        found.append((False, f"Training time against {name}: the runs used different devices ({devices})."))
    return found


def _ratio(ratio: Ratio | None, what: str, row: Row, reference: Row, target: float) -> tuple[bool, str]:
    name, counts = reference.group.label, f"n = {row.final.n} and {reference.final.n}"
    if ratio is None:
        return False, f"Speed-up in {what} over {name}: a run was at the target before it had trained."
    if ratio.low is None:
        return (
            False,
            f"Speed-up in {what} over {name}, {ratio.value:.2f}: no interval without a spread over seeds ({counts}).",
        )
    evidence = f"speed-up {ratio.value:.2f}, {CONFIDENCE:.0%} interval {interval(ratio)}, {counts}"
    if ratio.low <= 1 <= ratio.high:
        return False, f"Difference from {name} in {what} to {target:g}: {evidence}; the interval contains 1."
    if ratio.value < 1:
        return (
            True,
            f"Needs {1 / ratio.value - 1:.0%} more {what} than {name} to reach {target:g}: {evidence}.",
        )
    fewer = "fewer" if what == "steps" else "less"
    return True, f"Reaches {target:g} in {1 - 1 / ratio.value:.0%} {fewer} {what} than {name}: {evidence}."


def _loss(row: Row, reference: Row, sigma: float | None, loss_per_step: float) -> list[tuple[bool, str]]:
    name, mine, theirs = reference.group.label, row.group.planned_steps, reference.group.planned_steps
    found = []
    if mine != theirs and not (sigma and loss_per_step):
        found.append(
            (
                False,
                f"Final loss against {name}: {mine:,} and {theirs:,} steps of training are not the same budget.",
            )
        )
    elif row.p_holm is not None:
        side = "lower" if row.final.mean < reference.final.mean else "higher"
        adjusted = " after Holm's correction" if row.p_holm != row.p_baseline else ""
        evidence = (
            f"final loss {row.final.mean:.4f} against {reference.final.mean:.4f}, Welch's t-test "
            f"p {_equals(row.p_holm)}{adjusted}, n = {row.final.n} and {reference.final.n}"
        )
        found.append(
            (True, f"Ends {side} than {name}: {evidence}.")
            if row.p_holm < ALPHA
            else (False, f"Difference from {name} at the end: {evidence}, not below {ALPHA:g}.")
        )
    elif mine == theirs and not sigma:
        found.append(
            (
                False,
                f"Difference from {name} at the end: no test without a spread over seeds "
                f"(n = {row.final.n} and {reference.final.n}).",
            )
        )
    if row.z_baseline is not None:
        found.append(
            (
                row.z_baseline >= Z_LIMIT,
                f"Better than {name} if σ is {sigma:g}: {_known(row.z_baseline)}, "
                f"n = {row.final.n} and {reference.final.n}.",
            )
        )
    return found


def _known(z: float) -> str:
    sign = "≥" if z >= Z_LIMIT else "<"
    return f"z = {z:.2f} {sign} {Z_LIMIT:.2f} (one-sided p {_equals(z_pvalue(z))})"


def _equals(p: float) -> str:
    text = pvalue(p)
    return text if text.startswith("<") else f"= {text}"
