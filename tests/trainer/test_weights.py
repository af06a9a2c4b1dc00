"""The architecture is GPT-2's: weights exchanged with transformers give the same logits, and come back bit by bit."""

import dataclasses

import pytest
import torch

from tests.errors import raises_naming
from trainer.model import GPT, GPTConfig
from trainer.run.huggingface import from_hf, hf_config, to_hf

transformers = pytest.importorskip("transformers")

GPT2 = GPTConfig(name="gpt2_small_test", family="gpt2", init="gpt2", n_layer=3, n_head=4, n_embd=48, position="learned",
                   norm="layernorm", activation="gelu", tied=True, bias=True)  # fmt: skip


def random_hf(config: GPTConfig, vocab_size: int, seq_len: int):
    """A GPT2LMHeadModel in which every tensor is random: fresh biases are zeros and would hide a mix-up."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(hf_config(config, vocab_size, seq_len)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loaded(state: dict, config: GPTConfig, vocab_size: int, seq_len: int) -> GPT:
    model = GPT(config, vocab_size, seq_len)
    model.load_state_dict(state)
    return model


def test_logits_and_loss_equal_transformers():
    theirs = random_hf(GPT2, vocab_size=301, seq_len=40)
    ours = loaded(from_hf(theirs.state_dict(), GPT2), GPT2, 301, 40)
    tokens = torch.randint(301, (3, 33))
    with torch.no_grad():
        expected = theirs(tokens, labels=tokens)
        torch.testing.assert_close(ours(tokens), expected.logits, atol=1e-4, rtol=0)
        mean = ours(tokens[:, :-1], tokens[:, 1:]) / (3 * 32)
    torch.testing.assert_close(mean, expected.loss, atol=1e-5, rtol=0)


def test_logits_equal_with_the_shape_of_gpt2_124m():
    config = dataclasses.replace(GPT2, n_layer=2, n_head=12, n_embd=768)
    theirs = random_hf(config, vocab_size=50257, seq_len=1024)
    ours = loaded(from_hf(theirs.state_dict(), config), config, 50257, 1024)
    assert ours.wte.weight.shape == (50304, 768)
    tokens = torch.randint(50257, (1, 24))
    with torch.no_grad():
        expected, actual = theirs(tokens).logits, ours(tokens)
    assert actual.shape == (1, 24, 50257)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


def test_exchange_is_exact_in_both_directions():
    theirs = random_hf(GPT2, vocab_size=130, seq_len=16).state_dict()
    ours = from_hf(theirs, GPT2)
    back = to_hf(ours, GPT2, vocab_size=130)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    again = from_hf(back, GPT2)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_a_model_of_ours_loads_in_transformers():
    model = GPT(GPT2, 130, 16)
    theirs = transformers.GPT2LMHeadModel(hf_config(GPT2, 130, 16)).eval()
    theirs.load_state_dict(to_hf(model.state_dict(), GPT2, 130))
    tokens = torch.randint(130, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=0)


def test_names_without_prefix_and_with_causal_masks_are_understood():
    """The released GPT-2 files are those of the headless GPT2Model and carry masks."""
    theirs = random_hf(GPT2, vocab_size=130, seq_len=16).state_dict()
    released = {
        name.removeprefix("transformer."): tensor for name, tensor in theirs.items() if name != "lm_head.weight"
    }
    released |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(GPT2.n_layer)}
    assert all(torch.equal(a, b) for a, b in zip(from_hf(released, GPT2).values(), from_hf(theirs, GPT2).values(),
                                                 strict=True))  # fmt: skip


def test_copies_share_no_memory():
    theirs = random_hf(GPT2, vocab_size=128, seq_len=16).state_dict()  # 128: no padding that would force a copy
    ours = from_hf(theirs, GPT2)
    back = to_hf(ours, GPT2, 128)
    addresses = [{t.untyped_storage().data_ptr() for t in state.values()} for state in (theirs, ours, back)]
    assert not addresses[0] & addresses[1] and not addresses[1] & addresses[2]
    assert all(tensor.is_contiguous() for state in (ours, back) for tensor in state.values())


@pytest.mark.parametrize("change", [{"qk_norm": True}, {"norm": "rmsnorm"}, {"activation": "relu2"}, {"tied": False},
                                    {"position": "rope"}, {"softcap": 15.0},
                                    {"_target_": "mine.GPT"}])  # fmt: skip
def test_other_architectures_are_refused(change):
    config = dataclasses.replace(GPT2, **change)
    key = next(iter(change))
    with raises_naming(ValueError, f"model.{key}={change[key]}"):
        to_hf(GPT(config, 130, 16).state_dict(), config, 130)


def test_foreign_weights_are_refused():
    theirs = random_hf(GPT2, vocab_size=130, seq_len=16).state_dict()
    with raises_naming(ValueError, "h.3", "4 layers"):
        from_hf(theirs, dataclasses.replace(GPT2, n_layer=4))
    with raises_naming(ValueError, "h.2", "2 layers"):
        from_hf(theirs, dataclasses.replace(GPT2, n_layer=2))
    with raises_naming(ValueError, "lm_head", "untied"):
        from_hf(theirs | {"lm_head.weight": theirs["lm_head.weight"] + 1}, GPT2)
