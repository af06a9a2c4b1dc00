"""One precision for any number of ranks: what single and ddp compute in bfloat16 is what FSDP computes, bit for bit."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from examples.grouped_query_gpt import GroupedQueryConfig
from trainer import attention
from trainer.language_model import ModelConfig
from trainer.mesh import RECOMPUTED, ParallelConfig, build_mesh
from trainer.model import GPTConfig
from trainer.parallel import Parallel, local, unwrap

SMALL = dict(n_layer=2, n_head=2, n_embd=16)
TIED = GPTConfig(**SMALL, norm="layernorm", activation="gelu", tied=True, bias=True)
ROTARY = GPTConfig(**SMALL, position="half_rope", embed_norm=True, qk_norm=True, softcap=15.0)
OWN = GroupedQueryConfig(_target_="examples.grouped_query_gpt.GroupedQueryGPT", **SMALL)
CHUNKED = dataclasses.replace(ROTARY, loss_chunk=11)
MODELS = {"tied": TIED, "rotary": ROTARY, "rotary, in chunks": CHUNKED, "of one's own": OWN}
MODES = ("single", "ddp", "fsdp")
VOCABULARY, LENGTH = 70, 9


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Dtypes(TorchDispatchMode):
    """The dtypes that a model's arithmetic is made in, operation by operation."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name.split("::")[1] in ("mul", "add", "mm", "addmm", "bmm", "native_layer_norm", "rsqrt"):
            taken = [x.dtype for x in args if isinstance(x, torch.Tensor)]
            self.seen.append((str(function), *taken, torch.utils._pytree.tree_leaves(result)[0].dtype))
        return result


def run(mode: str, config: ModelConfig, recompute: str = "none", dtype: torch.dtype = torch.bfloat16) -> dict:
    """Two micro-batches, one step's gradients, an evaluation."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0, local_process_index=0)
    settings = ParallelConfig(mode=mode, activation_checkpointing=recompute)
    parallel = Parallel(settings, mode, accelerator, build_mesh(settings, mode, "cpu", 1), dtype, 0)
    model, modules, losses = parallel.wrap(config, VOCABULARY, LENGTH), [], []

    def note(name, given, out):
        modules.append((name, *(x.dtype for x in (*given, out) if isinstance(x, torch.Tensor))))

    for name, module in unwrap(model).named_modules():
        module.register_forward_hook(lambda _, given, out, name=name: note(name, given, out))
    tokens = torch.randint(VOCABULARY, (4, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    for i, part in enumerate(tokens.chunk(2)):
        with parallel.accumulate(model, last=i == 1), Dtypes() as arithmetic:
            loss = model(part[:, :-1], part[:, 1:])
            (loss / 36).backward()
        losses.append(loss.detach())
    with parallel.evaluation(model):
        losses.append(model(tokens[:, :-1], tokens[:, 1:]))
    parameters = dict(unwrap(model).named_parameters())
    assert {p.dtype for p in parameters.values()} | {p.grad.dtype for p in parameters.values()} == {torch.float32}
    grads = {name: local(p.grad) for name, p in parameters.items()}
    return {"modules": modules, "arithmetic": arithmetic.seen, "losses": losses, "grads": grads}


def low(arithmetic: list[tuple]) -> list[tuple]:
    """Without the sums of float32 gradients, which each mode makes in its own way."""
    return [entry for entry in arithmetic if torch.bfloat16 in entry]


@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("fused", [False, True])
def test_every_mode_computes_alike(config, recompute, fused, monkeypatch):
    monkeypatch.setattr(attention, "as_one_product", lambda x: fused)  # as on CUDA
    single, *others = (run(mode, config, recompute) for mode in MODES)
    for other in others:
        assert other["modules"] == single["modules"] and low(other["arithmetic"]) == low(single["arithmetic"])
        for a, b in zip(other["losses"], single["losses"], strict=True):
            assert torch.equal(a, b)
        for name, grad in single["grads"].items():
            assert torch.equal(other["grads"][name], grad), name


def test_where_float32_matters():
    """Products and the residual stream are bfloat16; rotations, logits and the loss are float32."""
    seen = run("single", ROTARY)
    blocks = [dtypes for name, *dtypes in seen["modules"] if name.startswith("blocks.")]
    assert blocks and all(dtypes[0] == dtypes[-1] == torch.bfloat16 for dtypes in blocks)
    assert seen["losses"][0].dtype == torch.float32
    products = {dtype for name, *dtypes in seen["arithmetic"] for dtype in dtypes if name.startswith("aten.mm")}
    assert products == {torch.bfloat16}
    turned = seen["arithmetic"].count(("aten.mul.Tensor", torch.bfloat16, torch.float32, torch.float32))
    assert turned >= 2 * 4 * ROTARY.n_layer


def test_float32_is_left_alone():
    seen = run("single", ROTARY, dtype=torch.float32)
    assert not any(torch.bfloat16 in entry for entry in seen["arithmetic"] + seen["modules"])
