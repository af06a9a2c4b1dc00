"""Initial weights: of seed and name alone, with the scale that their source gives."""

import dataclasses
import math

import pytest
import torch

from tests.trainer.test_model import GPT2, LENGTH, VARIANTS, VOCABULARY
from trainer.language_model import init_tensor
from trainer.model import GPT


def test_init_depends_on_seed_and_name_alone():
    with torch.device("meta"):
        model = GPT(GPT2, VOCABULARY, LENGTH)
    names = [name for name, _ in model.named_parameters()]
    torch.manual_seed(1)
    first = {name: model.init_parameter(name, seed=7) for name in names}
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = {name: model.init_parameter(name, seed=7) for name in reversed(names)}
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left alone
    assert all(torch.equal(first[name], second[name]) for name in names)
    deeper = GPT(dataclasses.replace(GPT2, n_layer=3), VOCABULARY, LENGTH)
    assert torch.equal(deeper.init_parameter("blocks.1.attn.q.weight", 7), first["blocks.1.attn.q.weight"])


def test_init_differs_between_seeds_and_names():
    draws = [init_tensor(name, (8, 8), seed, 0, 1) for name in ("blocks.0.attn.q.weight", "blocks.0.attn.k.weight")
             for seed in (0, 1)]  # fmt: skip
    assert len({tuple(tensor.flatten().tolist()) for tensor in draws}) == 4


def test_init_is_what_it_was():
    """The values are part of a run's identity: a change of the generator or the hash would change every run."""
    value = init_tensor("wte.weight", (4, 8), 0, 0.0, 0.02)
    golden = [-0.01673788, -0.01426043, -0.01604037, 0.02625259, 0.01040791, -0.01432431, -0.03287097, -0.00095718]
    torch.testing.assert_close(value[0], torch.tensor(golden), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", VARIANTS)
def test_init_has_the_scale_that_its_source_gives(name):
    config = dataclasses.replace(VARIANTS[name], n_embd=64, zero_init_proj=name == "modern")
    model = GPT(config, 1000, 64)
    for key, parameter in model.named_parameters():
        value = model.init_parameter(key, seed=0)
        assert value.shape == parameter.shape and value.dtype == torch.float32
        if parameter.shape[0] == model.padded_vocab:
            assert value[1000:].abs().max() == 0
            value = value[:1000]
        residual = key.endswith(("attn.o.weight", "mlp.proj.weight"))
        if key.endswith("bias") or (name == "modern" and (residual or key == "lm_head.weight")):
            assert value.abs().max() == 0
        elif parameter.ndim == 1:
            assert (value == 1).all()
        else:
            if name == "modern" and key == "wte.weight":
                expected = 1.0
            elif name == "gpt2" and residual:
                expected = 0.02 / math.sqrt(2 * config.n_layer)
            elif name == "gpt2" or key in ("wte.weight", "wpe.weight"):
                expected = 0.02
            else:
                expected = 1 / math.sqrt(3 * parameter.shape[1])
            assert abs(value.std() / expected - 1) < 0.05 and abs(value.mean()) < 0.1 * expected
