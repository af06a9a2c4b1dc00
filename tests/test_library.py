"""Every block of docs/library.md runs, and the tools that it names go on from what they have saved.

Lightning is in no extra: its test is skipped, in CI too, unless it was installed by hand.
"""

import copy
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from optim import Combined, Muon, NorMuon, build
from tests.distributed.harness import run_workers
from tests.errors import raises_naming

PAGE = (Path(__file__).resolve().parents[1] / "docs/library.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
PARTS = re.split(r"^#{1,3} (.+)$", PAGE, flags=re.M)  # no block has a line that begins so
BLOCKS = {
    title: BLOCK.findall(text) for title, text in zip(PARTS[1::2], PARTS[2::2], strict=True) if BLOCK.search(text)
}
SHARED, MOVING = "Muon in code of your own", ["Moving from AdamW", "Going on from a model that AdamW has trained"]
FSDP, DDP = "FSDP2, saved and loaded by torch.distributed.checkpoint", "DDP"
HUGGING_FACE, TOOLS = "Hugging Face models", ["Their Trainer", "Accelerate", "Lightning"]
PLAIN = [title for title in BLOCKS if title not in (SHARED, *MOVING, FSDP, DDP, HUGGING_FACE, *TOOLS)]


def names_of(*titles: str, blocks: slice = slice(None)) -> dict:
    """What the page's shared block and those of some sections define, run one after the other."""
    names: dict = {}
    exec(as_here(BLOCKS[SHARED][0]), names)
    torch.manual_seed(0)
    names["model"] = names["Net"]()
    torch.manual_seed(0)  # for a section that makes its own
    for title in titles:
        for block in BLOCKS[title][blocks]:
            exec(as_here(block), names)
    return names


def as_here(block: str) -> str:
    """A checkout's name for the package; no compiler, which would take ten seconds."""
    return block.replace("nanomuon", "optim").replace("model.compile()", 'model.compile(backend="aot_eager")')


def train(names: dict, steps: range) -> list[torch.Tensor]:
    for tokens in names["batches"](steps):
        names["optimizer"].zero_grad()
        names["model"](tokens).backward()
        names["optimizer"].step()
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in names["model"].parameters()]
    return [weight.clone() for weight in weights]


def by_plain_loop(steps: int) -> list[torch.Tensor]:
    names = names_of()
    names["optimizer"] = names["build"](names["model"])
    return train(names, range(steps))


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("title", PLAIN)
def test_blocks_of_one_process(title):
    names = names_of(title)
    assert isinstance(names["optimizer"], Combined)
    before = [p.detach().clone() for p in names["model"].parameters()]
    after = train(names, range(40, 43))
    assert all(not torch.equal(a, b) and b.isfinite().all() for a, b in zip(before, after, strict=True))


def test_what_a_plain_loop_has_saved():
    names = names_of("A plain loop", blocks=slice(1))
    saved, fresh = torch.load("checkpoint.pt", weights_only=True), names_of()
    fresh["model"].load_state_dict(saved["model"])
    fresh["optimizer"] = fresh["build"](fresh["model"])
    fresh["optimizer"].load_state_dict(saved["optimizer"])
    assert all(map(torch.equal, train(names, range(20, 23)), train(fresh, range(20, 23))))


def test_moving_from_adamw():
    """What stays with AdamW takes the step that AdamW would take; matrices take one of the same RMS."""
    names = names_of(*MOVING)
    model, optimizer, adamw = names["model"], names["optimizer"], names["adamw"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(adamw.state_dict())
    other = names["Net"]()
    other.load_state_dict(before)
    expected = torch.optim.AdamW(other.parameters())
    expected.load_state_dict(state)
    expected.param_groups[0]["betas"] = (0.9, 0.95)
    for net, its in ((model, optimizer), (other, expected)):
        its.zero_grad()
        net(*names["batches"]([1])).backward()
        its.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if optimizer.roles[name] == "matrix":
            step = before[name] * (1 - 3e-4 * 0.1) - p.detach()
            assert step.square().mean().sqrt().item() == pytest.approx(0.2 * 3e-4, rel=0.05), name
        else:
            torch.testing.assert_close(p, q)


def test_hugging_face_models():
    pytest.importorskip("transformers")
    for number, blocks, fused in [
        (0, slice(1), {"split": [3, 1], "conv1d": [True, True]}),
        (1, slice(2), {"split": [(32, 16, 16), 2, 1]}),
        (2, slice(3), {"split": [2, 1]}),
    ]:
        names = names_of(HUGGING_FACE, blocks=blocks)
        model, optimizer = names["model"], names["optimizer"]
        groups = optimizer.members["matrix"].param_groups
        for key, values in fused.items():
            assert sorted(map(str, values)) == sorted(str(group[key]) for group in groups), number
        tokens = torch.arange(32).view(2, 16) % 7
        losses = []
        for _ in range(6):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0], losses
    router = {name: role for name, role in optimizer.roles.items() if "gate.weight" in name}
    experts = {role for name, role in optimizer.roles.items() if "experts" in name}
    assert set(router.values()) == {"scalar"} and experts == {"matrix"}


def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    names = names_of("Their Trainer")
    data = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(64, (32, 8))]

    def losses(resume=None):
        torch.manual_seed(0)
        sizes = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=8)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        trainer = names["hugging_face"](str(tmp_path), model, data, 6, resume)
        assert isinstance(trainer.optimizer.optimizer, Combined)
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    whole = losses()
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert losses(str(tmp_path / "checkpoint-3")) == whole and len(whole) == 6


def test_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    run = names_of("Accelerate")["accelerated"]
    torch.manual_seed(0)
    whole = run(tmp_path / "whole", range(6))
    torch.manual_seed(0)
    run(tmp_path / "half", range(3))
    assert run(tmp_path / "half", range(3, 6), resume=True) == whole


def test_lightning(tmp_path):
    pytest.importorskip("lightning")
    run = names_of("Lightning")["lightned"]
    torch.manual_seed(0)
    whole = run(tmp_path / "whole", 2)
    assert run(tmp_path / "other", 2, tmp_path / "whole/epoch=0.ckpt") == whole[3:] and len(whole) == 6


def sharded(rank, world_size, folder):
    """The blocks, and two updates after what they have loaded."""
    os.chdir(folder)
    torch.set_default_dtype(torch.float64)
    names = names_of(FSDP, blocks=slice(1))
    train(names, range(7, 9))  # away from what was saved
    exec(as_here(BLOCKS[FSDP][1]), names)
    return train(names, range(3, 5))


def replicated(rank, world_size, folder):
    os.chdir(folder)
    torch.set_default_dtype(torch.float64)
    names = names_of(DDP)
    assert isinstance(names["optimizer"].members["matrix"], Muon) and dist.get_world_size() == world_size
    return train(names, range(3, 5))


@pytest.mark.slow
@pytest.mark.parametrize("worker", [sharded, replicated])
def test_blocks_of_several_processes(worker, tmp_path, float64):
    expected = by_plain_loop(5)
    for weights in run_workers(worker, 2, tmp_path, folder=str(tmp_path)):
        assert_close(weights, expected)
    if worker is replicated:
        names = names_of()
        names["optimizer"] = names["build"](names["model"])
        saved = torch.load("checkpoint.pt", weights_only=True)
        names["model"].load_state_dict(saved["model"])
        names["optimizer"].load_state_dict(saved["optimizer"])
        assert_close(train(names, range(3, 5)), expected)


def accelerated_replicas(rank, world_size, folder):
    """Two steps, saved; then from there to four, as it was built before: state that owners hold, under DDP."""
    from accelerate import Accelerator

    os.chdir(folder)
    torch.set_default_dtype(torch.float64)
    accelerator, names = Accelerator(cpu=True), names_of()
    for steps in (range(2), range(2, 4)):
        matrix = dict(optimizer=NorMuon, lr=0.02)
        scalar = dict(optimizer=torch.optim.AdamW, lr=1e-3)
        own = names_of()["model"]
        optimizer = build(own, matrix=matrix, scalar=scalar, process_group=dist.group.WORLD)
        model, optimizer = accelerator.prepare(own, optimizer)
        if steps.start:
            accelerator.load_state("saved")
        for tokens in names["batches"](steps):
            optimizer.zero_grad()
            accelerator.backward(model(tokens))
            optimizer.step()
        if not steps.start:
            with raises_naming(RuntimeError, "consolidate_state_dict(to=None)"):
                accelerator.save_state("saved")
            optimizer.optimizer.consolidate_state_dict(to=None)
            accelerator.save_state("saved")
            accelerator.free_memory()
    return [parameter.detach() for parameter in own.parameters()]


@pytest.mark.slow
def test_accelerate_with_state_at_the_owners(tmp_path, float64):
    pytest.importorskip("accelerate")
    names = names_of()
    matrix, scalar = dict(optimizer=NorMuon, lr=0.02), dict(optimizer=torch.optim.AdamW, lr=1e-3)
    names["optimizer"] = build(names["model"], matrix=matrix, scalar=scalar)
    expected = train(names, range(4))
    for weights in run_workers(accelerated_replicas, 2, tmp_path, folder=str(tmp_path)):
        assert_close(weights, expected)


def test_no_block_is_left_out():
    run = {SHARED, *MOVING, FSDP, DDP, HUGGING_FACE, *TOOLS, *PLAIN}
    assert run == set(BLOCKS) and len(PLAIN) >= 6
    assert len(BLOCK.findall(PAGE)) == PAGE.count("\n```python\n") == sum(map(len, BLOCKS.values()))
