"""QK-clip keeps attention's logits bounded where a large learning rate of Muon lets them grow."""

from optim import qk_clip
from scripts.lecture import gpt
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide
from trainer.model import GPT

TITLE = "QK-clip"
METHODS = ("muon",)
SIZE = (9.4, 3.8)

TAU, RATE = 10.0, 0.08


def measure(short: bool) -> dict:
    steps, found = 45 if short else 250, {}
    for label, tau in (("without", None), ("with", TAU)):
        noted, logits = {}, []

        def after_step(step: int, model: GPT, noted=noted, logits=logits, tau=tau) -> None:
            if not noted:
                for layer in (block.attn for block in model.blocks):
                    noted[layer] = layer.note_largest(layer.q.weight.device, layer.q.weight.dtype)
                return
            logits.append((step, max(s.max().item() for s in noted.values())))
            for layer, largest in noted.items():
                if tau:
                    qk_clip(layer.q.parameters(), layer.k.parameters(), largest, tau)
                largest.zero_()

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
