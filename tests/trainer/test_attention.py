"""Documents by blocks, as FlexAttention takes them on CUDA, against the mask of every query and key."""

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from examples.grouped_query_gpt import GroupedQueryConfig, GroupedQueryGPT
from trainer import attention
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


def trained(build, recompute: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = build()
    for name, parameter in model.named_parameters():
        parameter.data = model.init_parameter(name, 0)
    model.recompute = recompute
    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_give_what_the_mask_gives(name, request):
    expected = trained(MODELS[name], recompute=False)
    request.getfixturevalue("blocks")
    for recompute in (False, True):
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
