"""Says in plain sentences what the runs show and what they do not.

Every sentence names its test, its p or interval, and its n.
"""

from dataclasses import dataclass

from .groups import Comparison
from .paired import PILOT, POWER, Pairs
from .records import SHOWN
from .statistics import ALPHA, CONFIDENCE, Z_LIMIT, Ratio, z_pvalue
from .table import GAIN, Row, interval, pvalue, signed, span

NO_CLAIM = "Nothing: there is neither a target nor a baseline to compare with."


@dataclass(frozen=True)
class Claim:
    """A sentence about one group. `shown`: the runs support it. `faster`: it states a speed-up over the baseline."""

    label: str
    shown: bool
    text: str
    faster: bool = False


def claims(
    comparison: Comparison, rows: list[Row], sigma: float | None = None, loss_per_step: float = 0, gain: float = GAIN
) -> list[Claim]:
    """All sentences, in the order of the rows. Of a group with diverged seeds there is only the one that says so."""
    reference = next((row for row in rows if row.group is comparison.baseline), None)
    found = []
    for row in rows:
        if row.group.diverged:
            found.append(_diverged(row, row))
            continue
        if comparison.target is not None:
            found += _against_target(row, comparison.target, sigma)
        if reference is None or row is reference:
            continue
        if reference.group.diverged:
            found.append(_diverged(row, reference))
            continue
        if comparison.target is not None:
            found += _speed(row, reference, comparison.target)
        found += _loss(row, reference, sigma, loss_per_step)
        if row.pairs:
            found.append(_paired(row, row.pairs, reference.label, gain))
    return found


def scope(comparison: Comparison) -> str:
    """The limits of all the sentences together."""
    known = [f"{key.replace('_', ' ')} {comparison.setting[key]}" for key in SHOWN if comparison.setting[key]]
    differ = f", where models differ in {' and '.join(comparison.across)}," if comparison.across else ""
    return (
        f"All of this holds for {', '.join(known) or 'this setting'}{differ} and for nothing else. n counts seeds; "
        "intervals and tests cover the spread over seeds only. Whether every optimizer was tuned with the same care is "
        "not in the records: a lead over an untuned baseline is worth nothing."
    )


def _diverged(row: Row, culprit: Row) -> Claim:
    total = culprit.final.n + culprit.group.diverged
    text = (
        f"Nothing may be claimed: {culprit.group.diverged} of {total} seeds of {culprit.label} diverged, and the "
        "others do not stand for it."
    )
    return Claim(row.label, False, text)


def _against_target(row: Row, target: float, sigma: float | None) -> list[Claim]:
    n, mean = row.final.n, f"{row.final.mean:.4f}"
    found = []
    if row.p_target is not None:
        shown = row.p_target < ALPHA
        limit = "" if shown else f", not below {ALPHA:g}"
        evidence = f"mean {mean}, one-sample t-test p {_equals(row.p_target)}{limit}, n = {n}"
        found.append(Claim(row.label, shown, f"Final loss below {target:g}: {evidence}."))
    elif n > 1:
        text = f"All {n} seeds ended at exactly {mean}: no spread, no test. Does the seed reach the run?"
        found.append(Claim(row.label, False, text))
    elif not sigma:
        side = "below" if row.final.mean < target else "not below"
        text = f"One run ended at {mean}, {side} {target:g}: an observation. One seed says nothing about the next."
        found.append(Claim(row.label, False, text))
    if row.z_target is not None:
        text = f"Final loss below {target:g} if σ is {sigma:g}: {_known(row.z_target)}, n = {n}."
        found += [
            Claim(row.label, row.z_target >= Z_LIMIT, text),
            Claim(row.label, row.first_below is not None, one_step(row, target)),
        ]
    return found


def one_step(row: Row, target: float) -> str:
    """Track 3's claim: at one evaluated step, the same for all seeds."""
    if row.first_below is None:
        aside = row.group.aside
        why = f"no claim, runs set aside: {aside}" if aside else f"there is none, n = {row.final.n}"
        return f"Below {target:g} at one evaluated step of all seeds: {why}."
    at = row.first_below
    return (
        f"Below {target:g} at step {at.step:,}, evaluated by all seeds: mean {at.mean:.4f}, n = {at.n}, z = {at.z:.2f}."
    )


def _speed(row: Row, reference: Row, target: float) -> list[Claim]:
    for side in (row, reference):
        if side.reached < side.final.n:
            text = (
                f"Speed-up over {reference.label}: {side.reached} of {side.final.n} seeds of {side.label} reached "
                f"{target:g}, so its cost to the target is not known."
            )
            return [Claim(row.label, False, text)]
    found = [_ratio(row.speedup["steps"], "steps", row, reference, target)]
    if row.same_device:
        return [*found, _ratio(row.speedup["seconds"], "training time", row, reference, target)]
    devices = ", ".join(sorted(str(device) for device in row.group.devices | reference.group.devices))
    text = f"Training time against {reference.label}: the runs used different devices ({devices})."
    return [*found, Claim(row.label, False, text)]


def _ratio(ratio: Ratio | None, what: str, row: Row, reference: Row, target: float) -> Claim:
    name, counts = reference.label, _counts(row, reference)
    if ratio is None:
        return Claim(row.label, False, f"Speed-up in {what} over {name}: a run began at the target.")
    if ratio.low is None:
        text = f"Speed-up in {what} over {name}, {ratio.value:.2f}: no interval without a spread over seeds ({counts})."
        return Claim(row.label, False, text)
    evidence = f"speed-up {ratio.value:.2f}, {CONFIDENCE:.0%} interval {interval(ratio)}, {counts}"
    if ratio.low <= 1 <= ratio.high:
        text = f"Difference from {name} in {what} to {target:g}: {evidence}; the interval contains 1."
        return Claim(row.label, False, text)
    if ratio.value < 1:
        text = f"Needs {1 / ratio.value - 1:.0%} more {what} than {name} to reach {target:g}: {evidence}."
        return Claim(row.label, True, text)
    share = f"{1 - 1 / ratio.value:.0%} {'fewer' if what == 'steps' else 'less'}"
    return Claim(row.label, True, f"Reaches {target:g} in {share} {what} than {name}: {evidence}.", faster=True)


def _loss(row: Row, reference: Row, sigma: float | None, loss_per_step: float) -> list[Claim]:
    name, mine, theirs = reference.label, row.group.planned_steps, reference.group.planned_steps
    counts = _counts(row, reference)
    found = []
    if row.p_holm is not None:
        shown = row.p_holm < ALPHA
        side = "lower" if row.final.mean < reference.final.mean else "higher"
        adjusted = " after Holm's correction" if row.p_holm != row.p_baseline else ""
        evidence = (
            f"final loss {row.final.mean:.4f} against {reference.final.mean:.4f}, Welch's t-test "
            f"p {_equals(row.p_holm)}{adjusted}{'' if shown else f', not below {ALPHA:g}'}, {counts}"
        )
        subject = f"Ends {side} than {name}" if shown else f"Difference from {name} at the end"
        found.append(Claim(row.label, shown, f"{subject}: {evidence}."))
    elif mine != theirs and not (sigma and loss_per_step):
        text = f"Final loss against {name}: {mine:,} and {theirs:,} steps of training are not the same budget."
        found.append(Claim(row.label, False, text))
    elif mine == theirs and not sigma:
        text = f"Difference from {name} at the end: no test without a spread over seeds ({counts})."
        found.append(Claim(row.label, False, text))
    if row.z_baseline is not None:
        text = f"Better than {name} if σ is {sigma:g}: {_known(row.z_baseline)}, {counts}."
        found.append(Claim(row.label, row.z_baseline >= Z_LIMIT, text))
    return found


def _paired(row: Row, pairs: Pairs, name: str, gain: float) -> Claim:
    loss, steps = pairs.loss, pairs.steps
    if loss.low is None or loss.high is None:
        text = f"all {pairs.n} differences are {signed(loss.mean, 4)}: no spread, no test"
        return Claim(row.label, False, f"Difference from {name} at the same seeds: {text}.")
    shown = row.p_pairs_holm is not None and row.p_pairs_holm < ALPHA
    welch = f"; Welch's {span(*pairs.welch, 4)}" if pairs.welch else ""
    adjusted = " after Holm's correction" if row.p_pairs_holm != loss.p else ""
    limit = "" if shown else f", not below {ALPHA:g}"
    worth = f"worth {signed(steps.mean, 0)} of {row.group.planned_steps:,} steps"
    worth += "" if steps.low is None or steps.high is None else f" ({span(steps.low, steps.high, 0)})"
    evidence = (
        f"{signed(loss.mean, 4)}, {CONFIDENCE:.0%} interval {span(loss.low, loss.high, 4)}{welch}, {worth}, paired "
        f"t-test p {_equals(row.p_pairs_holm)}{adjusted}{limit}, n = {pairs.n} pairs"
    )
    if shown:
        side = "lower" if loss.mean < 0 else "higher"
        return Claim(row.label, True, f"Ends {side} than {name} at the same seeds: {evidence}.")
    return Claim(row.label, False, f"Difference from {name} at the same seeds: {evidence}. {_power(pairs, gain)}")


def _power(pairs: Pairs, gain: float) -> str:
    """What would decide it."""
    if pairs.n < PILOT:
        return f"{PILOT} pairs are the fewest that tell how many seeds would decide it."
    if pairs.worth is None:
        return f"The baseline's loss does not fall over its last {gain:.0%} of the steps, so their worth is not known."
    what = f"a gain of {gain:.0%} of the steps, here {pairs.worth:.4f} of loss, with {POWER:.0%} power"
    if pairs.seeds is None:
        return f"To find {what}, a thousand seeds do not suffice."
    more = pairs.seeds - pairs.n
    return f"To find {what} takes {pairs.seeds} seeds" + (f", {more} more." if more > 0 else ": there are enough.")


def _counts(row: Row, reference: Row) -> str:
    return f"n = {row.final.n} and {reference.final.n}"


def _known(z: float) -> str:
    sign = "≥" if z >= Z_LIMIT else "<"
    return f"z = {z:.2f} {sign} {Z_LIMIT:.2f} (one-sided p {_equals(z_pvalue(z))})"


def _equals(p: float) -> str:
    text = pvalue(p)
    return text if text.startswith("<") else f"= {text}"
