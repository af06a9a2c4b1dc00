"""QK-clip keeps attention's logits bounded where a large learning rate of Muon lets them grow."""

import torch
from torch import Tensor

from scripts.lecture import gpt
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide
from trainer.attention import Attention
from trainer.model import GPT

TITLE = "QK-clip"
METHODS = ("muon",)
SIZE = (9.4, 3.8)

TAU, RATE = 10.0, 0.08


class Watch:
    """Records every head's largest causal logit of the last forward pass of each attention layer."""

    def __init__(self) -> None:
        self.seen: dict[Attention, dict[str, Tensor]] = {}

    def attach(self, model: GPT) -> None:
        for layer in (block.attn for block in model.blocks):
            self.seen[layer] = {}
            for name in ("q", "k"):
                getattr(layer, name).register_forward_hook(
                    lambda _module, _inputs, output, at=self.seen[layer], name=name: at.update({name: output.detach()})
                )

    def largest(self, layer: Attention) -> Tensor:
        """[heads]"""
        heads = (layer.n_head, layer.head_dim)
        q, k = (self.seen[layer][name].unflatten(-1, heads).transpose(1, 2) for name in ("q", "k"))
        logits = q @ k.mT / layer.head_dim**0.5  # [B, H, T, T]
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        return logits.masked_fill(future, -torch.inf).amax((0, 2, 3))


@torch.no_grad()
def clip(layer: Attention, largest: Tensor, tau: float) -> None:
    """Scale W_q and W_k of every head by sqrt(min(1, tau / largest[head]))."""
    root = (tau / largest.clamp_min(tau)).sqrt().repeat_interleave(layer.head_dim).unsqueeze(1)
    layer.q.weight.mul_(root)
    layer.k.weight.mul_(root)


def measure(short: bool) -> dict:
    steps, found = 45 if short else 250, {}
    for label, tau in (("without", None), ("with", TAU)):
        watch, logits = Watch(), []

        def after_step(step: int, model: GPT, watch=watch, logits=logits, tau=tau) -> None:
            if not watch.seen:
                watch.attach(model)
                return
            largest = {layer: watch.largest(layer) for layer in watch.seen}
            logits.append((step, max(s.max().item() for s in largest.values())))
            if tau:
                for layer, s in largest.items():
                    clip(layer, s, tau)

        losses = gpt.train(
            "optim=muon",
            f"optim.matrix.lr={RATE}",
            "schedule=constant",
            steps=steps,
            evaluate_every=steps if short else 25,
            after_step=after_step,
        )
        found[label] = dict(logits=logits, losses=losses)
    return found


def check(measured: dict) -> list[Check]:
    tops = {label: max(s for _, s in case["logits"]) for label, case in measured.items()}
    ends = {label: case["losses"][-1][1] for label, case in measured.items()}
    return [
        Check("largest logit without QK-clip / τ", tops["without"] / TAU, low=2),
        Check("largest logit with QK-clip / τ", tops["with"] / TAU, 0.9, 2.0),
        Check("validation loss with − without, nats per byte", ends["with"] - ends["without"], high=0.1),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    for (label, case), colour in zip(measured.items(), COLOURS, strict=False):
        left.plot(*zip(*case["logits"], strict=True), color=colour, linewidth=1, label=f"{label} QK-clip")
        right.plot(*zip(*case["losses"], strict=True), "o-", markersize=3.5, color=colour, label=f"{label} QK-clip")
    left.axhline(TAU, color="black", linewidth=0.8, linestyle=":", label="τ")
    left.set(yscale="log", xlabel="step", ylabel="largest logit of attention")
    left.set_yticks([3, 10, 30, 100, 300], ["3", "10", "30", "100", "300"])
    left.minorticks_off()
    right.set(xlabel="step", ylabel="validation loss, nats per byte", ylim=(2.2, 3.8))
    guide(left)
    guide(right)
