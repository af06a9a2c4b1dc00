"""muP: learning rates and decay that hold at every width, for any rule in any role.

At width n = ratio × base_width the network computes and learns as at the base if (Yang et al., "Tensor Programs V",
arXiv 2203.03466, table 8, in the form with an output multiplier; as norms of matrices: Yang et al., arXiv 2310.17813)

    initial values    matrices of the blocks as wide as 1/sqrt(fan_in), all others as at the base   (initial.py)
    logits            divided by ratio                                                             (model.py)
    attention         scores scaled by 1/d in place of 1/sqrt(d), d the head dimension             (model.py)
    a step            of a matrix in the blocks has a spectral norm that does not grow, a step of the embedding, the
                      head or a vector one that grows as sqrt(n), as their own norms do

So a rule whose steps have a spectral norm of n^g, at a given lr, takes ratio^(-g) times the lr in the blocks, and
ratio^(1/2 - g) elsewhere; ``growth`` knows g.  What it says of whole-matrix rules is what Qiu et al. derive and use
(arXiv 2512.05620; charliezchen/scaling-matrix-preconditioning, train.py): Adam, and what is grafted on it, 1/fan_in;
Muon, SOAP and Shampoo of roots 1/4 sqrt(fan_out/fan_in); SGD fan_out/fan_in.  It holds for gradients of low rank
beside the width: SOAP's steps grow where it is high, one of what the paper calls finite-width deviations.

Decay: lr × weight_decay falls as 1/ratio for every rule and role, as that paper has it for independent decay.
Adam's eps stays: where gradients, which fall as 1/ratio, come near it, lower it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optim import AdamH, AdaMuon, Shampoo, Steepest
from optim.matrix import MatrixOptimizer
from optim.routing import ROLES, resolve_target
from optim.settings import defaults_of

Growth = tuple[float, float]  # of a step's spectral norm with the width: of a matrix in the blocks; elsewhere
ENTRIES: Growth = (1.0, 0.5)  # every entry has a size of its own, whatever the gradient's
GRADIENT: Growth = (0.0, -0.5)  # in proportion to the gradient, whose entries fall as 1/width
UNIT: Growth = (0.0, 0.0)  # the spectral norm is given
SCALES: dict[str | None, Growth] = {  # of such a step, by `scale` of ours and `adjust_lr_fn` of torch's Muon
    **dict.fromkeys(("keller", "rms_to_rms", "original", None), (0.0, -0.5)),
    **dict.fromkeys(("match_rms", "match_rms_adamw"), (0.5, 0.0)),
}
NORMS: dict[str, Growth] = {  # unit balls of lmo.py
    **dict.fromkeys(("spectral", "frobenius", "l2", "l1", "nuclear"), UNIT),
    **dict.fromkeys(("rms_to_rms", "rms_to_inf"), (0.0, -0.5)),
    **dict.fromkeys(("linf", "rms", "one_to_rms"), ENTRIES),
}
DECAYS = ("weight_decay", "cautious_decay")


def growth(rule: type, settings: Mapping[str, Any]) -> Growth:
    """How the spectral norm of a rule's step grows with the width at a given lr: two exponents.

    A rule that is not known steps by entries, as Adam does; one on whole matrices by a polar factor.
    Raises ValueError: its steps follow no power of the width.
    """
    settings = defaults_of(rule) | dict(settings)
    on_matrices = issubclass(rule, MatrixOptimizer)
    if issubclass(rule, Steepest):
        if settings.get("form") == "regularised":
            raise ValueError("form=regularised has no width law: give form=normalised, or model.param=standard")
        return NORMS[settings["norm"]]
    if issubclass(rule, AdamH):
        return 0.5, 0.5  # in parts of ||W||, which grows as sqrt(width), along a direction of low rank
    if settings.get("constraint"):
        return UNIT  # the same, along a polar factor of full rank, whose length grows as sqrt(width) too
    if issubclass(rule, Shampoo) and settings["graft"] != "adam":
        return GRADIENT if settings["graft"] == "sgd" else UNIT
    if issubclass(rule, AdaMuon | Shampoo):
        return ENTRIES
    if issubclass(rule, torch.optim.Muon):
        return SCALES[settings["adjust_lr_fn"]]
    if issubclass(rule, torch.optim.SGD):
        return GRADIENT
    if on_matrices:
        return SCALES[settings["scale"]] if "scale" in settings else UNIT
    return ENTRIES


def multipliers(role: str, rule: type, settings: Mapping[str, Any], ratio: float) -> dict[str, float]:
    """What ``lr`` and ``weight_decay`` of a role are multiplied with at ``ratio`` times the width."""
    in_blocks, elsewhere = growth(rule, settings)
    lr = ratio ** (-in_blocks if role == "matrix" else 0.5 - elsewhere)
    return {"lr": lr, "weight_decay": 1 / (ratio * lr)}


def follow_width(
    role: str, rule: type, settings: dict[str, Any], patterns: Mapping[str, dict[str, Any]], ratio: float
) -> dict[str, float]:
    """Give the settings of a role, and ``patterns`` (by_name), their lr and decays at ``ratio`` times the width.

    Returns those of the role.

    Raises ValueError: naming the role, for a rule whose steps follow no power of the width.
    """
    if ratio == 1:
        return {}
    try:
        found = _scaled(role, rule, settings, ratio)
        for own in patterns.values():
            scaled = _scaled(role, rule, {**settings, **own}, ratio)
            own |= {key: value for key, value in scaled.items() if key in own or value != found[key]}
    except ValueError as error:
        raise ValueError(f"optim.{role}, {rule.__name__}: {error}") from None
    settings |= found
    return found


def _scaled(role: str, rule: type, settings: Mapping[str, Any], ratio: float) -> dict[str, float]:
    settings, factors = defaults_of(rule) | dict(settings), multipliers(role, rule, settings, ratio)
    return {key: settings[key] * factors["lr" if key == "lr" else "weight_decay"]
            for key in ("lr", *DECAYS) if settings.get(key)}  # fmt: skip


def check_lines(schedule: Any, ratio: float) -> None:
    """Raises ValueError for a decay that ``schedule.ROLE`` sets, which would not follow the width."""
    for role in ROLES if ratio != 1 else ():
        for key in set(DECAYS) & set(getattr(schedule, role)):
            raise ValueError(f"schedule.{role}.{key} is in force at every width, but model.param=mup divides it: give "
                             f"optim.{role}.{key}")  # fmt: skip


def with_multipliers(table: Sequence[Mapping[str, Any]], config: Any) -> Sequence[Mapping[str, Any]]:
    """Rows of the optimizers' table with what lr and decay of their role were multiplied with, where they were."""
    if (ratio := config.model.width_ratio) == 1:
        return table
    found = []
    for row in table:
        rule, settings = resolve_target(getattr(config.optim, row["role"]), row["role"])
        factors = multipliers(row["role"], rule, settings, ratio)
        found.append({**row, **{f"{key} ×": f"{factor:.4g}" for key, factor in factors.items()}})
    return found
