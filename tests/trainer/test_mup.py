"""muP: the law of every preset, and what it promises: activations and their updates are as large at every width."""

import math

import pytest
import torch

from common import UserError
from optim.routing import ROLES, build_from_config, resolve_target
from tests.errors import raises_naming
from tests.optim.test_configs import NAMES, settings
from tests.runs import TINY
from trainer.metrics.console import Display
from trainer.model import GPT, GPTConfig
from trainer.run.huggingface import check_gpt2
from trainer.schedules import mup

WIDE = ["model.param=mup", "model.base_width=8"]


def step_length(rule, options, rows, width, noise):
    """Spectral norm of the sixth step, for gradients of rank 2 whose entries fall as 1/width, as muP's do."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (rows, width))
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.nn.Parameter(weight * (width**-0.5 if rows == width else 1))
    optimizer = rule([weight], **options)
    for _ in range(6):
        before = weight.detach().clone()
        pair = left * (1 + 0.1 * torch.randn(2, generator=generator, dtype=torch.float64))
        rest = noise * torch.randn(rows, width, generator=generator, dtype=torch.float64)
        weight.grad = (pair @ right.T + rest) / width
        optimizer.step()
    return torch.linalg.matrix_norm(weight.detach() - before, 2).item()


@pytest.mark.parametrize(("name", "role"), [*((name, "matrix") for name in NAMES), ("adamw", "head"), ("sgd", "head"),
                                            ("scion", "head")])  # fmt: skip
def test_steps_grow_as_the_law_says(name, role):
    rule, options = resolve_target(settings(name, "tiny")[role], role)
    for key in ("weight_decay", "fused"):
        options.pop(key, None)
    options |= {"constrained": False} if "constrained" in options else {}
    noise = 0.3 if options.get("constraint") else 0  # the law of a kept norm is that of gradients of full rank
    narrow, wide = (step_length(rule, options, n if role == "matrix" else 24, n, noise) for n in (32, 128))
    assert math.log(wide / narrow, 4) == pytest.approx(mup.growth(rule, options)[role != "matrix"], abs=0.15)


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        ("optim.Muon", {"scale": "match_rms"}, (1 / 2, 1 / 2)),
        ("torch.optim.Muon", {"adjust_lr_fn": "match_rms_adamw"}, (1 / 2, 1 / 2)),
        ("optim.Shampoo", {"graft": "none"}, (1, 1 / 4)),
        ("optim.Shampoo", {"graft": "sgd"}, (1, 1 / 4)),
        ("optim.Scion", {"norm": "linf"}, (1 / 4, 1)),
        ("torch.optim.RAdam", {}, (1 / 4, 1)),
    ],
)
def test_settings_that_change_the_law(rule, options, expected):
    rule, options = resolve_target({"_target_": rule, **options}, "optim.matrix")
    lr, decay = mup.multipliers("matrix", rule, options, 4.0).values()
    assert (lr, decay) == pytest.approx(expected)
    assert lr * decay == pytest.approx(1 / 4), "decay and lr together fall as the width grows"


def test_at_the_base_it_is_the_standard_parametrisation(configure):
    plain, base = (configure(*TINY, *words) for words in ((), ("model.param=mup", "model.base_width=16")))
    assert plain.optim == base.optim and base.model.score_scale is None
    models = [GPT(config.model, 257, 16) for config in (plain, base)]
    for name, _ in models[0].named_parameters():
        assert torch.equal(*(model.init_parameter(name, 3) for model in models))


@pytest.mark.parametrize("init", ["gpt2", "fan_in", "torch"])
def test_initial_values(init):
    """Twice as wide: a block's matrices are smaller by the root of 2, everything else is as large as at the base."""
    base, wide = (
        GPT(GPTConfig(n_layer=1, n_head=2, n_embd=n, init=init, bias=True, param="mup", base_width=64), 257, 128)
        for n in (64, 128)
    )
    spread = lambda model, name: model.init_parameter(name, 0)[:257].std().item()  # noqa: E731
    for name, parameter in base.named_parameters():
        if spread(base, name):
            ratio = 0.5**0.5 if name.startswith("blocks.") and parameter.ndim == 2 else 1.0
            rel = 0.25 if parameter.ndim == 1 else 0.04  # few are drawn of a bias
            assert spread(wide, name) / spread(base, name) == pytest.approx(ratio, rel=rel)


def test_scores_fall_with_the_head_dimension():
    scale = lambda **more: GPTConfig(n_embd=128, n_head=4, param="mup", base_width=64, **more).score_scale  # noqa: E731
    assert scale() is None and scale(attention_scale=0.12) == 0.12, "more heads, as wide as at the base"
    assert scale(base_head_dim=16) == 16**0.5 / 32 and scale(base_head_dim=16, attention_scale=0.12) == 0.06


def test_settings_follow_and_the_table_says_so(configure, capsys):
    words = [*TINY, "optim=adamw", "optim.matrix.by_name={*.o.weight: {lr: 0.5}}"]
    base, wide = configure(*words), configure(*words, *WIDE)
    assert wide.optim.matrix["lr"] == base.optim.matrix["lr"] / 2
    assert wide.optim.matrix["by_name"] == {"*.o.weight": {"lr": 0.25}}
    assert wide.optim.matrix["weight_decay"] == 0.1 and wide.optim.head["weight_decay"] == 0.05
    assert wide.optim.embedding["lr"] == base.optim.embedding["lr"]
    table = build_from_config(GPT(wide.model, 257, 16), {role: getattr(wide.optim, role) for role in ROLES}).table()
    assert mup.with_multipliers(table, base) is table
    rows = mup.with_multipliers(table, wide)
    assert [(row["lr ×"], row["weight_decay ×"]) for row in rows] == [("0.5", "1"), *[("1", "0.5")] * 3]
    Display(10).table(rows)
    assert "lr ×" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.param=mup"], ["model.base_width=null", "n_embd"]),
        (["model.param=mup", "model.base_width=0"], ["model.base_width=0"]),
        (["model.param=wide"], ["model.param=wide", "mup"]),
        ([*WIDE, "optim=steepest", "optim.matrix.form=regularised"], ["optim.matrix", "regularised", "normalised"]),
        ([*WIDE, "schedule.matrix.weight_decay=[[0,0],[1,0.1]]"], ["schedule.matrix.weight_decay", "optim.matrix"]),
    ],
)
def test_mistakes_give_one_line(configure, words, named):
    with raises_naming(UserError, *named):
        configure(*TINY, *words)


def test_gpt2_has_no_output_multiplier():
    gpt2 = dict(position="learned", norm="layernorm", activation="gelu", tied=True, bias=True)
    check_gpt2(GPTConfig(**gpt2))
    with raises_naming(ValueError, "model.param=mup", "standard"):
        check_gpt2(GPTConfig(**gpt2, param="mup", base_width=64))


def changes(configure, optim, param, width, steps=3):
    """RMS of the blocks' outputs at the start, and of what the steps change in them and in the logits.

    The head starts at zero, as muP's authors advise: a random one makes the narrow models' logits larger.  So the first
    of the steps moves the head alone."""
    config = configure("experiment=smoke", f"optim={optim}", f"model.param={param}", "model.base_width=64",
                       "model.n_layer=2", f"model.n_embd={width}", f"model.n_head={width // 16}")  # fmt: skip
    model, seen = GPT(config.model, 257, 32), []
    for name, parameter in model.named_parameters():
        parameter.data = model.init_parameter(name, seed=1) * (name != "lm_head.weight")
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    optimizer = build_from_config(model, {role: getattr(config.optim, role) for role in ROLES})
    tokens = torch.randint(0, 257, (4, 33), generator=torch.Generator().manual_seed(0))
    snapshots = []
    for step in range(steps + 1):
        seen.clear()
        logits = model(tokens[:, :-1])
        snapshots.append([*seen, logits.detach()])
        if step < steps:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
    first, last = snapshots[0], snapshots[-1]
    return [x.square().mean().sqrt().item() for x in [*first[:-1], *(b - a for a, b in zip(first, last, strict=True))]]


def slopes(configure, optim, param, widths):
    """By how many powers of 2 each of them grows where the width doubles."""
    narrow, wide = (changes(configure, optim, param, width) for width in widths)
    return [math.log(b / a, widths[1] / widths[0]) for a, b in zip(narrow, wide, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_activations_and_updates_are_as_large_at_every_width(configure, optim):
    """From 64 to 512; those of the standard parametrisation are seen to grow: with AdamW in every block, with Muon in
    the logits alone, which have no multiplier there."""
    assert slopes(configure, optim, "mup", (64, 512)) == pytest.approx([0] * 5, abs=0.15)
    least = {"adamw": (0.25, 0.25, 0.5), "muon": (-0.3, -0.3, 0.5)}[optim]
    assert all(a >= b for a, b in zip(slopes(configure, optim, "standard", (64, 256))[2:], least, strict=True))
