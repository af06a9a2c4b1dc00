"""Time a training step of ours against one of nanoGPT's, on the CPU, on the same shape, in one process.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python scripts/bench_step.py --nanogpt ../nanoGPT

4 layers, 4 heads, 128 dimensions, 12 sequences of 64 tokens, vocabulary 65, float32, AdamW, no bias, no compilation.
nanoGPT's model and optimizer come from its checkout; the step around them does what its train.py does. Blocks of steps
alternate between the two, so that a change of the machine's speed meets both; each pair of blocks gives one ratio.
Before that, the two models with the same weights must give the same loss: they do the same work.
"""

import argparse
import contextlib
import importlib.util
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer.model import ModelConfig
from trainer.parallel import Parallel, ParallelConfig, setup

LAYERS, HEADS, WIDTH, SEQUENCES, LENGTH, VOCABULARY = 4, 4, 128, 12, 64, 65
LR, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0


def nanogpt_model(checkout: Path) -> nn.Module:
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = dict(n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, block_size=LENGTH, vocab_size=VOCABULARY)
    with contextlib.redirect_stdout(io.StringIO()):  # it announces its parameter counts
        return module.GPT(module.GPTConfig(**shape, bias=False, dropout=0.0))


def our_model(parallel: Parallel) -> nn.Module:
    """GPT-2's architecture, with nanoGPT's form of GELU and without biases."""
    config = ModelConfig(
        n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, position="learned", norm="layernorm", activation="gelu_erf",
        tied=True, bias=False, family="gpt2",
    )  # fmt: skip
    return parallel.wrap(config, VOCABULARY, LENGTH)


def check_same_work(theirs: nn.Module, ours: nn.Module) -> None:
    """Give ours nanoGPT's weights and compare the losses; exit where they differ by more than rounding."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.o": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
    with torch.no_grad():
        ours.wte.weight[:VOCABULARY] = state["wte.weight"]
        ours.wpe.weight.copy_(state["wpe.weight"])
        ours.norm.weight.copy_(state["ln_f.weight"])
        for i, block in enumerate(ours.blocks):
            for part, tensor in zip("qkv", state[f"h.{i}.attn.c_attn.weight"].chunk(3), strict=True):
                block.get_submodule(f"attn.{part}").weight.copy_(tensor)
            for here, there in names.items():
                block.get_submodule(here).weight.copy_(state[f"h.{i}.{there}.weight"])
        tokens, targets = torch.randint(VOCABULARY, (2, SEQUENCES, LENGTH))
        expected = theirs(tokens, targets)[1].item()
        actual = ours(tokens, targets).item() / (SEQUENCES * LENGTH)
    if abs(actual - expected) > 1e-5:
        raise SystemExit(f"error: with the same weights nanoGPT's loss is {expected} and ours {actual}")
    print(f"same weights, same loss: nanoGPT {expected:.6f}, ours {actual:.6f}")


def nanogpt_step(model: nn.Module, tokens: Path) -> Callable[[], torch.Tensor]:
    """A closure that takes one step as nanoGPT's train.py does with --device=cpu --compile=False."""
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(DECAY, LR, BETAS, "cpu")

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(tokens, dtype=np.uint16, mode="r")  # anew for every batch, as there
        starts = torch.randint(len(data) - LENGTH, (SEQUENCES,))
        inputs, targets = (
            torch.stack([torch.from_numpy(data[i + shift : i + shift + LENGTH].astype(np.int64)) for i in starts])
            for shift in (0, 1)
        )
        return inputs, targets

    ahead = batch()

    def step() -> torch.Tensor:
        nonlocal ahead
        for group in optimizer.param_groups:
            group["lr"] = LR
        _, loss = model(*ahead)
        ahead = batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def our_step(parallel: Parallel, model: nn.Module, tokens: Path) -> Callable[[], torch.Tensor]:
    """A closure that takes one step of ours with torch's fused AdamW."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=DECAY), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    data = np.memmap(tokens, dtype=np.uint16, mode="r")
    span = SEQUENCES * LENGTH

    def step() -> torch.Tensor:
        start = int(torch.randint(len(data) - span, ()))
        window = torch.from_numpy(data[start : start + span + 1].astype(np.int64))
        inputs, targets = window[:-1].view(SEQUENCES, LENGTH), window[1:].view(SEQUENCES, LENGTH)
        with parallel.accumulate(model, last=True):
            loss = model(inputs, targets) / span
            loss.backward()
        parallel.clip(model, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def time_block(step: Callable[[], torch.Tensor], steps: int) -> float:
    """Seconds per step."""
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begin) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--blocks", type=int, default=20, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=20, help="steps in a block")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not (args.nanogpt / "model.py").is_file():
        raise SystemExit(f"error: --nanogpt={args.nanogpt} holds no model.py: give a checkout of karpathy/nanoGPT")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(VOCABULARY, size=1_000_000, dtype=np.uint16).tofile(tokens)
        parallel = setup(ParallelConfig(mode="single", compile=False), dtype="float32")
        their_model, model = nanogpt_model(args.nanogpt), our_model(parallel)
        check_same_work(their_model, model)
        theirs, ours = nanogpt_step(their_model, tokens), our_step(parallel, model, tokens)
        for step in (theirs, ours):
            time_block(step, args.steps)
        pairs = []
        for index in range(args.blocks):
            order = (theirs, ours) if index % 2 == 0 else (ours, theirs)
            times = {step: time_block(step, args.steps) for step in order}
            pairs.append((times[theirs], times[ours]))
    report(pairs)


def report(pairs: list[tuple[float, float]]) -> None:
    ratios = sorted(theirs / ours for theirs, ours in pairs)
    for name, column in (("nanoGPT", 0), ("ours", 1)):
        print(f"{name:8} {1e3 * statistics.median(pair[column] for pair in pairs):7.2f} ms per step (median)")
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    print(f"speed ratio, nanoGPT's time / ours: median {statistics.median(ratios):.3f}, "
          f"80% of {len(ratios)} pairs within {low:.3f} to {high:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
