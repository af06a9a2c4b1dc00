import dataclasses
import math
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from data import IGNORE_INDEX
from tests.errors import raises_naming
from trainer.attention import rotate, rotation
from trainer.model import GPT, MLP, GPTConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
SMALL = dict(n_layer=2, n_head=2, n_embd=16)
GPT2 = GPTConfig(family="gpt2", init="gpt2", norm="layernorm", activation="gelu", tied=True, bias=True, **SMALL)
MODERN = GPTConfig(family="modern", position="half_rope", embed_norm=True, qk_norm=True, attention_scale=0.12,
                     softcap=15.0, **SMALL)  # fmt: skip
VARIANTS = {
    "gpt2": GPT2,
    "modern": MODERN,
    "rope": GPTConfig(position="rope", **SMALL),
    "tiny": GPTConfig(**SMALL),
    "headbias": GPTConfig(bias=True, activation="gelu_erf", **SMALL),
}
VOCABULARY, LENGTH = 70, 12


def build(config: GPTConfig, dtype=torch.float64, vocab_size=VOCABULARY, seq_len=LENGTH) -> GPT:
    """A model in which every parameter is random, so that no zero or one hides a mistake."""
    torch.manual_seed(0)
    model = GPT(config, vocab_size, seq_len).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def draw(batch=3, length=LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (batch, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].clone()


def gradients(model: GPT, *batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(*batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


# --- the loss ---


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_is_the_sum_of_the_tokens_losses(name):
    model, (tokens, targets) = build(VARIANTS[name]), draw()
    targets[1, 3:6] = IGNORE_INDEX
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none").sum()
    torch.testing.assert_close(model(tokens, targets), expected)
    assert model(tokens, targets).dtype == torch.float64
    assert model.float()(tokens, targets).dtype == torch.float32


@pytest.mark.parametrize("name", ["gpt2", "modern", "headbias"])
@pytest.mark.parametrize("chunk", [1, 7, 35])
def test_loss_in_chunks_equals_the_whole(name, chunk):
    tokens, targets = draw()
    targets[0, :8] = IGNORE_INDEX  # more than a whole chunk of 7 is ignored
    whole_loss, whole = gradients(build(VARIANTS[name]), tokens, targets)
    chunked_loss, chunked = gradients(build(dataclasses.replace(VARIANTS[name], loss_chunk=chunk)), tokens, targets)
    torch.testing.assert_close(chunked_loss, whole_loss, rtol=1e-12, atol=0)
    for key in whole:
        torch.testing.assert_close(chunked[key], whole[key], rtol=1e-9, atol=1e-12)


@dataclasses.dataclass(eq=False)
class Saved:
    tensor: torch.Tensor


class LargestLogits(TorchDispatchMode):
    """Notes the most rows that any tensor as wide as the vocabulary has."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] in (VOCABULARY, 128):
                self.rows = max(self.rows, tensor.numel() // tensor.shape[-1])
        return result


@pytest.mark.parametrize("training", [True, False])
def test_logits_of_more_than_a_chunk_never_exist(training):
    model, batch = build(dataclasses.replace(GPT2, loss_chunk=17)), draw(batch=10)
    kept = weakref.WeakSet()  # what the forward pass leaves for the backward pass
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: note(Saved(t)), lambda saved: saved.tensor)

    def note(saved: Saved) -> Saved:
        kept.add(saved)
        return saved

    with LargestLogits() as seen, torch.set_grad_enabled(training):
        with hooks:
            loss = model(*batch)
        shapes = [saved.tensor.shape for saved in kept]
        if training:
            loss.backward()
    assert seen.rows == 17
    assert bool(shapes) == training and not any(shape[-1:] in ((VOCABULARY,), (128,)) for shape in shapes)


@pytest.mark.parametrize("chunk", [512, 4096])
def test_no_product_is_made_twice(chunk):
    """GPT-2 124M: 741 MFLOP a token in the products of weights, the head's once."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768, tied=True, loss_chunk=chunk), 50257, 1024)
        tokens = torch.zeros(2, 1024, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    counts = counter.get_flop_counts()["Global"]
    products = counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)
    assert products == 6 * (12 * 12 * 768**2 + 50304 * 768) * tokens.numel()


def test_ignored_targets_carry_no_gradient():
    model, (tokens, targets) = build(GPT2), draw()
    loss, grads = gradients(model, tokens, torch.full_like(targets, IGNORE_INDEX))
    assert loss == 0 and all(grad.abs().max() == 0 for grad in grads.values())


# --- the vocabulary's padding ---


@pytest.mark.parametrize("name", ["gpt2", "modern", "headbias"])
def test_padding_is_never_predicted(name):
    model, batch = build(VARIANTS[name]), draw()
    assert model.wte.weight.shape[0] == 128 and model(batch[0]).shape == (3, LENGTH, VOCABULARY)
    loss, grads = gradients(model, *batch)
    padded = {key: p for key, p in model.named_parameters() if p.shape[0] == 128}
    with torch.no_grad():
        for parameter in padded.values():
            parameter[VOCABULARY:] = 1e3
    again, _ = gradients(model, *batch)
    assert loss == again
    assert all(grads[key][VOCABULARY:].abs().max() == 0 for key in padded)
    assert any(grads[key][:VOCABULARY].abs().min() > 0 for key in padded)


# --- attention and positions ---


@pytest.mark.parametrize("name", VARIANTS)
@settings(deadline=None, max_examples=8)
@given(changed=st.integers(1, LENGTH - 1), value=st.integers(0, VOCABULARY - 1))
def test_no_token_sees_the_future(name, changed, value):
    model, (tokens, _) = build(VARIANTS[name]), draw()
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1 + value) % VOCABULARY
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    differs = (other[:, changed] != tokens[:, changed]).nonzero().flatten()
    assert ((before - after)[differs, -1].abs().amax(-1) > 0).all()  # and every token sees the past


@pytest.mark.parametrize("name", VARIANTS)
def test_attention_knows_the_order_of_tokens(name):
    model, (tokens, _) = build(VARIANTS[name]), draw()
    swapped = tokens[:, [1, 0, *range(2, LENGTH)]]
    assert (model(tokens)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-6


@settings(deadline=None, max_examples=8)
@given(start=st.integers(1, LENGTH - 1), name=st.sampled_from(["modern", "rope"]))
def test_documents_of_a_window_do_not_see_each_other(start, name):
    """With relative positions a document gives the same logits inside a window and alone."""
    model, (tokens, targets) = build(VARIANTS[name]), draw()
    tokens = tokens.clamp(min=1)
    tokens[:, start] = 0
    mixed, alone = model(tokens), model(tokens[:, start:])
    assert (mixed[:, start:] - alone).abs().max() > 1e-6
    model.document_start = 0
    apart = model(tokens)
    torch.testing.assert_close(apart[:, start:], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(apart[:, :start], mixed[:, :start], rtol=1e-9, atol=1e-9)
    model.recompute = "full"
    model(tokens, targets).backward()  # the mask travels into what is recomputed


@settings(deadline=None, max_examples=20)
@given(shift=st.integers(0, 40), kind=st.sampled_from(["rope", "half_rope"]))
def test_rotary_scores_depend_on_distance_alone(shift, kind):
    cos, sin = rotation(kind, 16, 64, torch.empty(0, dtype=torch.float64))
    q, k = torch.randn(2, 1, 1, 2, 16, dtype=torch.float64).unbind(0)

    def score(i: int, j: int) -> torch.Tensor:
        return (rotate(q, cos[[i]], sin[[i]]) * rotate(k, cos[[j]], sin[[j]])).sum(-1)

    torch.testing.assert_close(score(9 + shift, 2 + shift), score(9, 2))
    assert (score(9, 2) - score(9, 3)).abs().max() > 1e-3


def test_half_rope_turns_half_of_the_pairs():
    x = torch.randn(1, 8, 2, 16, dtype=torch.float64)
    turned = rotate(x, *rotation("half_rope", 16, 8, x))
    still = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
    assert torch.equal(turned[..., still], x[..., still])
    assert ((turned - x)[:, 1:, :, [0, 1, 2, 3, 8, 9, 10, 11]] != 0).all()
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_qk_norm_ignores_the_scale_of_queries_and_keys():
    for normed in (True, False):
        model, (tokens, _) = build(dataclasses.replace(MODERN, qk_norm=normed)), draw()
        before = model(tokens)
        with torch.no_grad():
            model.blocks[0].attn.q.weight.mul_(50)
            model.blocks[1].attn.k.weight.mul_(50)
        assert torch.allclose(model(tokens), before, atol=1e-3) == normed


def test_attention_scale_is_applied():
    model, (tokens, _) = build(dataclasses.replace(GPT2, attention_scale=8**-0.5)), draw()
    torch.testing.assert_close(model(tokens), build(GPT2)(tokens))  # the default for 8 dimensions a head
    assert not torch.allclose(build(dataclasses.replace(GPT2, attention_scale=0.12))(tokens), model(tokens))


def test_softcap_bounds_the_logits_and_keeps_small_ones():
    free, capped = build(GPT2), build(dataclasses.replace(GPT2, softcap=2.0))
    with torch.no_grad():
        for model, scale in ((free, 50.0), (capped, 50.0)):
            model.wte.weight.mul_(scale)
    tokens, _ = draw()
    assert free(tokens).abs().max() > 2 and capped(tokens).abs().max() <= 2
    assert torch.equal(free(tokens).argmax(-1), capped(tokens).argmax(-1))
    small = torch.tensor([[1e-4] * 16], dtype=torch.float64)
    torch.testing.assert_close(capped.logits(1e-4 * small), free.logits(1e-4 * small), rtol=1e-6, atol=0)


def test_a_sequence_longer_than_the_positions_is_refused():
    with raises_naming(ValueError, "13 tokens", "12 positions"):
        build(GPT2)(torch.zeros(1, 13, dtype=torch.int64))
    assert build(MODERN)(torch.zeros(1, 13, dtype=torch.int64)).shape == (1, 13, VOCABULARY)


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("name", VARIANTS)
def test_recomputation_changes_nothing(name, how):
    plain, recomputing = build(VARIANTS[name]), build(VARIANTS[name])
    recomputing.recompute = how
    expected, actual = gradients(plain, *draw()), gradients(recomputing, *draw())
    assert torch.equal(expected[0], actual[0])
    assert all(torch.equal(expected[1][key], actual[1][key]) for key in expected[1])


# --- size and settings ---

GPT2_SIZES = {  # parameters of the released models, in transformers' GPT2LMHeadModel
    "gpt2_124m": 124_439_808,
    "gpt2_350m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
}


@pytest.mark.parametrize("path", sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "custom.yaml"}), ids=lambda p: p.stem)
def test_config_files_are_models(path):
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(GPTConfig), OmegaConf.load(path)))
    config.check()
    assert config.name == path.stem
    with torch.device("meta"):
        model = GPT(config, 50257, 1024)
    count = sum(p.numel() for p in model.parameters())
    if config.family == "gpt2":
        assert count - (model.padded_vocab - 50257) * config.n_embd == GPT2_SIZES[path.stem]
    if path.stem == "modern_124m":
        matrices = 12 * 12 * 768**2
        assert count == 2 * 50304 * 768 + matrices + (2 * 12 + 2) * 768


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_flops_equal_those_counted(name):
    config = dataclasses.replace(VARIANTS[name], n_embd=32)
    model = GPT(config, 128, 64)
    tokens = torch.randint(128, (2, 64))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == pytest.approx(model.flops_per_token() * tokens.numel(), rel=1e-6)


@pytest.mark.parametrize(("setting", "words"), [
    (dict(n_head=5), ["model.n_head=5", "model.n_embd=128", "1, 2, 4, 8"]),
    (dict(n_head=256), ["model.n_head=256", "model.n_embd=128"]),
    (dict(n_layer=0), ["model.n_layer=0", "at least 1"]),
    (dict(loss_chunk=0), ["model.loss_chunk=0", "at least 1"]),
    (dict(position="alibi"), ["model.position=alibi", "learned, rope, half_rope"]),
    (dict(norm="batchnorm"), ["model.norm=batchnorm", "layernorm, rmsnorm"]),
    (dict(activation="swish"), ["model.activation=swish", "gelu, gelu_erf, relu2"]),
    (dict(init="zeros"), ["model.init=zeros", "gpt2, fan_in"]),
    (dict(position="half_rope", n_head=64), ["model.position=half_rope", "head dimension", "4"]),
    (dict(softcap=-1.0), ["model.softcap=-1.0", "positive"]),
    (dict(attention_scale=float("nan")), ["model.attention_scale=nan", "positive"]),
])  # fmt: skip
def test_impossible_settings_are_one_clear_line(setting, words):
    with raises_naming(ValueError, *words):
        GPT(GPTConfig(**setting), VOCABULARY, LENGTH)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(name):
    model, (tokens, _) = GPT(VARIANTS[name], VOCABULARY, LENGTH), draw(batch=4)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(model.init_parameter(key, seed=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(losses[0] - math.log(VOCABULARY)) < 0.2 and losses[-1] < 0.3 * losses[0]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_and_evaluation_compute_in_the_dtype_that_is_set(run, monkeypatch, dtype):
    seen, forward = set(), MLP.forward

    def noted(self, x):
        y = forward(self, x)
        seen.add((torch.is_grad_enabled(), y.dtype))
        return y

    monkeypatch.setattr(MLP, "forward", noted)
    trainer = run("run", f"train.dtype={dtype}", "train.steps=1")
    assert seen == {(True, getattr(torch, dtype)), (False, getattr(torch, dtype))}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
