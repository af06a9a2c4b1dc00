"""RMSProp follows a target that moves; AdaGrad's steps have shrunk by then."""

import torch

from scripts.lecture.descend import descend, optimizer, parameter, slope
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "RMSProp on a moving target"
METHODS = ("adagrad", "rmsprop")
SIZE = (9.2, 3.8)

PERIOD = 200
RATES = {"adagrad": (4.0, 8.0, 16.0), "rmsprop": (0.2, 0.4, 0.8)}


def measure(short: bool) -> dict:
    stretches = 40 if short else 60
    found = {}
    for name, rates in RATES.items():
        settings = dict(alpha=0.95) if name == "rmsprop" else {}
        for rate in rates[1:2] if short else rates:
            generator = torch.Generator().manual_seed(21)
            x, first, errors = parameter(torch.zeros(64, 1, dtype=torch.float64)), [], []
            target = lambda k: 6.0 * (k // PERIOD % 2)  # noqa: E731

            def gradient(x, k, generator=generator, target=target):
                return x - target(k) + torch.randn(x.shape, generator=generator, dtype=torch.float64)

            run = descend(optimizer(name, x, lr=rate, **settings), x, gradient, PERIOD * stretches - 1)
            for k, point in run:
                if k % 5 == 0:
                    first.append((k, point[0].item()))
                errors.append((point - target(k)).square().mean())
            by_stretch = torch.stack(errors).view(stretches, PERIOD).mean(1)
            found[name, rate] = dict(first=first, errors=by_stretch.tolist())
    best = {}
    for (name, rate), case in found.items():
        case |= dict(rate=rate, early=sum(case["errors"][:5]))
        best[name] = min(case, best.get(name, case), key=lambda case: case["early"])
    return best


def check(measured: dict) -> list[Check]:
    adagrad, rmsprop = (measured[name]["errors"] for name in ("adagrad", "rmsprop"))
    fifth = len(adagrad) // 5
    growth = slope(range(2, len(adagrad) + 1), adagrad[1:])
    later = sum(adagrad[-fifth:]) / sum(rmsprop[-fifth:])
    return [
        Check("last fifth: mean squared distance, AdaGrad / RMSProp", later, low=1.3),
        Check(
            "RMSProp: last fifth / first fifth, without the first stretch",
            sum(rmsprop[-fifth:]) / fifth / (sum(rmsprop[1:fifth]) / (fifth - 1)),
            0.85,
            1.15,
        ),
        Check("AdaGrad: exponent with which its distance grows over the stretches", growth, low=0.1),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ks = [k for k, _ in measured["rmsprop"]["first"]]
    left.step(ks, [6.0 * (k // PERIOD % 2) for k in ks], color="black", linewidth=0.8, label="x*", where="post")
    for (name, label), colour in zip((("adagrad", "AdaGrad"), ("rmsprop", "RMSProp")), COLOURS, strict=False):
        case = measured[name]
        left.plot(*zip(*case["first"], strict=True), color=colour, linewidth=1, label=f"{label}, α = {case['rate']:g}")
        right.plot(range(1, len(case["errors"]) + 1), case["errors"], color=colour, label=label)
    left.set(xlabel="iteration k", ylabel="x", ylim=(-2.5, 11), xlim=(ks[-1] - 3 * PERIOD, ks[-1]))
    right.set(xlabel="stretch of 200 iterations", ylabel="mean of (x − x*)²", ylim=(0, None))
    guide(left, ncols=3, loc="upper left")
    guide(right)
