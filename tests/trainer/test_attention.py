"""What attention does on CUDA alone, on a CPU: documents by blocks against the mask of every query and key; q, k and v
as one product against three."""

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from examples.grouped_query_gpt import GroupedQueryConfig, GroupedQueryGPT
from trainer import attention
from trainer.mesh import RECOMPUTED
from trainer.model import GPT, GPTConfig

LENGTH, VOCABULARY, START = 150, 11, 3  # more than a block of 128, and no multiple
MODELS = {
    "gpt": lambda: GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, attention_scale=0.3), VOCABULARY, LENGTH, START),
    "grouped queries": lambda: GroupedQueryGPT(GroupedQueryConfig(n_layer=1, n_embd=64), VOCABULARY, LENGTH, START),
}


@pytest.fixture
def blocks(monkeypatch):
    """As on CUDA, but uncompiled; and a CPU, of which torch asks that it make no backward pass, makes one."""
    monkeypatch.setattr(attention, "has_blocks", lambda tokens, head_dim: True)
    monkeypatch.setattr(attention, "_compiled", lambda function: function)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


def trained(build, recompute: str, length: int = LENGTH) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = build()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(model.init_parameter(name, 0))
    model.recompute = recompute
    tokens = torch.randint(VOCABULARY, (2, length))
    loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


class Products(TorchDispatchMode):
    """Counts products of matrices, attention's own left out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name in ("aten::mm", "aten::addmm")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_one_product_makes_what_three_make(bias, recompute, monkeypatch):
    """To the last bits of float64, gradients of every single parameter included."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, bias=bias, qk_norm=True, position="rope")
    found = []
    for fused in (False, True):
        monkeypatch.setattr(attention, "as_one_product", lambda x, fused=fused: fused)
        with Products() as products:
            found.append(trained(lambda: GPT(config, VOCABULARY, 16).double(), recompute, 16))
        found[-1].insert(0, products.count)
    (three, *expected), (one, *values) = found
    # 2 products less forward, 4 backward, 2 where forward is made again
    assert three - one == (8 if recompute == "full" else 6)
    for a, b in zip(values, expected, strict=True):
        assert (a - b).norm() <= 1e-13 * b.norm()


@pytest.mark.parametrize("name", MODELS)
def test_blocks_give_what_the_mask_gives(name, request):
    expected = trained(MODELS[name], recompute="none")
    request.getfixturevalue("blocks")
    for recompute in RECOMPUTED:
        for a, b in zip(trained(MODELS[name], recompute), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_blocks_without_a_visible_key_are_skipped(blocks):
    tokens = torch.ones(1, 512, dtype=torch.int64)
    tokens[0, 256] = START  # the second half is a document of its own
    mask = attention.document_mask(tokens, START, 64)
    assert isinstance(mask, BlockMask)
    assert mask.to_dense()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_other_documents_are_other_inputs_of_the_same_graph(blocks):
    """Every batch has its own mask: none may compile the block anew."""
    compiled, model = [], MODELS["gpt"]()

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    for block in model.blocks:
        block.compile(backend=backend)
    for _ in range(3):
        tokens = torch.randint(VOCABULARY, (2, LENGTH))
        model(tokens, tokens).backward()
    torch._dynamo.reset()
    assert len(compiled) == 1
