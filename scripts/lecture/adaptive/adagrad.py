"""AdaGrad on sparse features: rare coordinates keep long steps."""

import torch

from scripts.lecture.descend import descend, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "AdaGrad on sparse features"
METHODS = ("sgd", "adagrad")
SIZE = (9.2, 3.8)

RATES = {"sgd": (0.03, 0.06, 0.125, 0.25, 0.5, 1.0), "adagrad": (0.06, 0.125, 0.25, 0.5, 1.0, 2.0)}
FEATURES = 50


def measure(short: bool) -> dict:
    repeats, steps = (64, 2000) if short else (128, 4000)
    rates = {name: (values[1], values[3]) for name, values in RATES.items()} if short else RATES
    frequency = torch.arange(1.0, FEATURES + 1, dtype=torch.float64) ** -1.5
    found = {}
    for name, values in rates.items():
        for rate in values:
            generator = torch.Generator().manual_seed(20)

            def gradient(x, k, generator=generator):
                present = torch.rand(x.shape, generator=generator, dtype=torch.float64) < frequency
                a = present * (2.0 * torch.randint(2, x.shape, generator=generator) - 1)
                noise = 0.3 * torch.randn(len(x), 1, generator=generator, dtype=torch.float64)
                return ((a * (x - 1)).sum(-1, keepdim=True) - noise) * a

            x = parameter(torch.zeros(FEATURES, dtype=torch.float64), repeats)
            method = optimizer(name, x, lr=rate)
            *_, (_, end) = descend(method, x, gradient, steps)
            errors = (end - 1).square().mean(0)
            found[name, rate] = dict(errors=errors, loss=(frequency * errors).sum().item() / 2)
            if name == "adagrad":
                found[name, rate]["steps"] = method.state[x]["sum"].mean(0).rsqrt()  # in units of α
    best = {name: min(values, key=lambda rate, name=name: found[name, rate]["loss"]) for name, values in rates.items()}
    return dict(found=found, best=best, frequency=frequency)


def check(measured: dict) -> list[Check]:
    found, best = measured["found"], measured["best"]
    rare = {name: found[name, rate]["errors"][-20:].mean().item() for name, rate in best.items()}
    loss = {name: found[name, rate]["loss"] for name, rate in best.items()}
    spread = [case["loss"] for (name, _), case in found.items() if name == "adagrad"]
    lengths = found["adagrad", best["adagrad"]]["steps"]
    return [
        Check(
            "AdaGrad in the end: step, relative to the gradient, of the rarest weight / of the commonest (SGD: 1)",
            (lengths[-1] / lengths[0]).item(),
            low=3,
        ),
        Check("SGD at its best step: mean squared error of the 20 rarest weights", rare["sgd"], low=0.02),
        Check("the same / AdaGrad's at its best step", rare["sgd"] / rare["adagrad"], low=1),
        Check("loss of SGD / of AdaGrad, each at its best step", loss["sgd"] / loss["adagrad"], low=1.5),
        Check("AdaGrad: worst / best loss over the steps drawn", max(spread) / min(spread), low=1.5),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    labels = {"sgd": "SGD", "adagrad": "AdaGrad"}
    for (name, rate), colour in zip(measured["best"].items(), COLOURS, strict=False):
        errors = measured["found"][name, rate]["errors"]
        left.plot(measured["frequency"], errors, "o", markersize=4, color=colour, label=f"{labels[name]}, α = {rate:g}")
        points = [(r, min(case["loss"], 3)) for (n, r), case in measured["found"].items() if n == name]
        right.plot(*zip(*points, strict=True), "o-", color=colour, label=labels[name])
    left.set(
        xscale="log", yscale="log", xlabel="how often the feature is present", ylabel="squared error of its weight"
    )
    left.invert_xaxis()
    right.set(xscale="log", yscale="log", ylim=(None, 2), xlabel="step α", ylabel="loss in the end, less the noise")
    guide(left)
    guide(right)
