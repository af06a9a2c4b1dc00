"""What of a block is kept for its backward pass: nothing else changes, and less of it is kept."""

import gc

import pytest
import torch

from common import UserError
from scripts.planning.live_bytes import LiveBytes
from tests.errors import raises_naming
from tests.runs import SHORT
from tests.trainer.test_attention import Products
from trainer.launch import load_config
from trainer.mesh import RECOMPUTED
from trainer.model import GPT, GPTConfig
from trainer.parallel import initialise

MODELS = {
    "gpt2": GPTConfig(n_layer=3, n_embd=64, norm="layernorm", activation="gelu", bias=True, tied=True),
    "modern": GPTConfig(n_layer=3, n_embd=64, position="half_rope", qk_norm=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_less_is_kept_and_no_bit_changes(name):
    tokens = torch.randint(70, (4, 65), generator=torch.Generator().manual_seed(0))
    kept, products, values = {}, {}, {}
    for how in RECOMPUTED:
        model = GPT(MODELS[name], 70, 64)
        initialise(model, 0)
        model.recompute = how
        with LiveBytes() as memory, Products() as counted:
            loss = model(tokens[:, :-1], tokens[:, 1:])
            gc.collect()
            kept[how], made = memory.alive, counted.count
            loss.backward()
        products[how] = counted.count - made
        values[how] = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    assert 2 * kept["full"] < kept["selective"] < 0.8 * kept["none"]
    assert products["selective"] == products["none"] < products["full"]
    assert all(torch.equal(*pair) for how in RECOMPUTED for pair in zip(values[how], values["none"], strict=True))


@pytest.mark.parametrize(("asked", "how"), [("true", "full"), ("false", "none"), ("selective", "selective")])
def test_earlier_values_mean_what_they_did(asked, how):
    config = load_config([*SHORT, f"parallel.activation_checkpointing={asked}"])
    assert config.parallel.activation_checkpointing == how


def test_other_values_are_refused():
    with raises_naming(UserError, "parallel.activation_checkpointing=some", "full, selective, none"):
        load_config([*SHORT, "parallel.activation_checkpointing=some"])
