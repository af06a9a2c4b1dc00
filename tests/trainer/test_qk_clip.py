"""optim.qk_clip: what the trainer hands over, and that it costs and changes nothing where it is not asked for."""

import pytest
import torch

from common import UserError
from tests.errors import raises_naming
from tests.runs import read_losses
from trainer import attention
from trainer.attention import largest_scores, same_document
from trainer.guard import NonFiniteGuard
from trainer.model import GPT


@pytest.mark.parametrize("mask", ["causal", "documents", "blocks"])
def test_largest_scores_are_those_that_a_query_sees(mask, monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 150, 16, dtype=torch.float64).unbind()  # more than a block of 128 queries
    tokens, start = torch.randint(5, (2, 150)), 3
    visible = torch.ones(150, 150, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    given = None
    if mask != "causal":
        visible = given = same_document(tokens, start)
    if mask == "blocks":
        monkeypatch.setattr(attention, "has_blocks", lambda tokens, head_dim: True)
        monkeypatch.setattr(attention, "_compiled", lambda function: function)
        given = attention.document_mask(tokens, start, 16)
    expected = (q @ k.mT * 0.3).masked_fill(~visible, -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(largest_scores(q, k, given, 0.3), expected, rtol=1e-13, atol=0)


RISING = ["optim=muon", "optim.matrix.lr=0.3", "train.dtype=float64", "train.steps=4", "schedule=constant"]


def test_a_run_is_that_of_the_algorithm_by_hand(run, monkeypatch, tmp_path):
    """The same run, its weights scaled by hand after every update, from the logits of all its batches."""
    tau, clipped = 1.1, []
    run("clipped", *RISING, f"optim.qk_clip={tau}", "train.micro_batch=12")
    seen, step, forward = [], NonFiniteGuard.step, GPT.forward

    def watched(self, tokens, targets=None, cache=None):
        if self.training and torch.is_grad_enabled():
            outputs = {}
            hooks = [
                part.register_forward_hook(lambda *call, key=(i, name): outputs.update({key: call[2].detach()}))
                for i, block in enumerate(self.blocks)
                for name, part in (("q", block.attn.q), ("k", block.attn.k))
            ]
            loss = forward(self, tokens, targets, cache)
            for hook in hooks:
                hook.remove()
            seen.append((self, outputs))
            return loss
        return forward(self, tokens, targets, cache)

    def by_hand(self, optimizers, number, *sums):
        skipped = step(self, optimizers, number, *sums)
        model, batches = seen[0][0], [outputs for _, outputs in seen]  # the warm-up's is the first of the update's
        with torch.no_grad():
            for i, block in enumerate(model.blocks):
                heads, d = block.attn.n_head, block.attn.head_dim
                for h in range(heads):
                    rows, tops = slice(h * d, (h + 1) * d), []
                    for of in batches:
                        q, k = of[i, "q"][..., rows], of[i, "k"][..., rows]
                        scores = q @ k.mT / d**0.5
                        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
                        tops.append(scores.masked_fill(future, -torch.inf).max().item())
                    gamma = min(1.0, tau / max(tops))
                    clipped.append(gamma < 1)
                    block.attn.q.weight[rows] *= gamma**0.5
                    block.attn.k.weight[rows] *= gamma**0.5
        seen.clear()
        return skipped

    monkeypatch.setattr(GPT, "forward", watched)
    monkeypatch.setattr(NonFiniteGuard, "step", by_hand)
    run("by hand", *RISING, "train.micro_batch=12")
    assert any(clipped) and not all(clipped)
    got, want = (read_losses(tmp_path / name, missing=0.0) for name in ("clipped", "by hand"))
    assert len(got) == len(want) == 5
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-12)


def test_off_it_reads_no_logits_and_out_of_reach_it_changes_nothing(run, monkeypatch, tmp_path):
    run("far", "optim.qk_clip=1e9", "train.steps=2")
    monkeypatch.setattr(attention, "largest_scores", None)
    run("off", "train.steps=2")
    assert read_losses(tmp_path / "far") == read_losses(tmp_path / "off")


def test_an_update_that_is_skipped_clips_nothing(run):
    trainer = run("skipped", "optim.qk_clip=1e-3", "train.steps=2")
    layer, noted = trainer.qk_clip.layers[0]
    before = layer.q.weight.detach().clone()
    noted.fill_(torch.nan)
    trainer.qk_clip.step(torch.ones(()))
    assert torch.equal(layer.q.weight, before) and not noted.any()
    noted.fill_(1.0)
    trainer.qk_clip.step(torch.zeros(()))
    torch.testing.assert_close(layer.q.weight, before * 1e-3**0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optim.qk_clip=0"], ("optim.qk_clip=0", "above 0")),
        (["optim.qk_clip=50", "model.qk_norm=true"], ("optim.qk_clip=50", "model.qk_norm")),
        (
            ["optim.qk_clip=50", "model=custom", "model._target_=examples.grouped_query_gpt.GroupedQueryGPT"],
            ("optim.qk_clip=50", "GroupedQueryGPT", "Attention"),
        ),
    ],
)
def test_where_it_cannot_be_it_is_refused(run, settings, words):
    with raises_naming(UserError, *words):
        run("refused", *settings)
