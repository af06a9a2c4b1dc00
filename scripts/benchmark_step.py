"""Time the Trainer's whole update against nanoGPT's training step, on the CPU, on the same shape, in one run.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python scripts/benchmark_step.py --nanogpt ../nanoGPT

4 layers, 4 heads, 128 dimensions, 12 sequences of 64 tokens, vocabulary 65, float32, AdamW, no bias, no compilation.
nanoGPT's model and optimizer come from its checkout; the step around them does what its train.py does. Ours is a
Trainer built from the configuration, with its loader, clipping, guard against NaN, stop signal and record. Each has a
process of its own, as its users have, and takes its turn while the other waits, so that a change of the machine's
speed meets both; a pair of blocks of steps gives one ratio. Time is the processor's, of all threads of a process: other
work on the machine hardly changes it. Before that, the two models with the same weights must give the same loss: they
do the same work.
"""

import argparse
import contextlib
import importlib.util
import io
import multiprocessing
import multiprocessing.connection
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.shards import write_shard  # noqa: E402
from data.split import TrainValSplit  # noqa: E402
from scripts.benchmarks.options import count  # noqa: E402
from trainer import loop  # noqa: E402
from trainer.launch import load_config  # noqa: E402

LAYERS, HEADS, WIDTH, SEQUENCES, LENGTH, VOCABULARY = 4, 4, 128, 12, 64, 65
LR, BETAS, DECAY, CLIP, LOG_EVERY = 1e-3, (0.9, 0.99), 0.1, 1.0, 10


def nanogpt_model(checkout: Path) -> nn.Module:
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = dict(n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, block_size=LENGTH, vocab_size=VOCABULARY)
    with contextlib.redirect_stdout(io.StringIO()):  # it announces its parameter counts
        return module.GPT(module.GPTConfig(**shape, bias=False, dropout=0.0))


def our_trainer(folder: Path, tokens: np.ndarray) -> loop.Trainer:
    """A Trainer of GPT-2's architecture, with nanoGPT's form of GELU and without biases."""
    shards = [folder / f"it_{part}_000000.bin" for part in ("val", "train")]
    for shard in shards:
        write_shard(shard, tokens)
    loop.open_split = lambda config: TrainValSplit(shards[1:], shards[:1], "letters", VOCABULARY, 0)
    settings = [f"model.n_layer={LAYERS}", f"model.n_head={HEADS}", f"model.n_embd={WIDTH}", "model.family=gpt2",
                "model.init=gpt2", "model.norm=layernorm", "model.activation=gelu_erf", "model.tied=true"]  # fmt: skip
    for role in ("matrix", "embedding", "head", "scalar"):
        family = ".gpt2" if role == "matrix" else ""  # the preset has these betas for each family
        settings += [f"optim.{role}.lr={LR}", f"optim.{role}.betas{family}={list(BETAS)}"]
    settings += ["model=tiny", "optim=adamw", "data=shards", f"data.dir={folder}", "data.order=shuffled",
                 "schedule=constant", "parallel=single", "logger=jsonl", f"logger.every={LOG_EVERY}",
                 f"train.seq_len={LENGTH}", f"train.batch_tokens={SEQUENCES * LENGTH}", "train.steps=1000000",
                 f"train.micro_batch={SEQUENCES}", f"train.clip={CLIP}", "train.dtype=float32",
                 "eval.every=1000000", "eval.tokens=768", f"run.dir={folder / 'run'}"]  # fmt: skip
    config = load_config(settings)
    trainer = loop.Trainer(config)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.metrics.start(trainer.optimizers.table(), trainer.model.flops_per_token())
    return trainer


def check_same_work(theirs: nn.Module, ours: nn.Module) -> str:
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
    return f"same weights, same loss: nanoGPT {expected:.6f}, ours {actual:.6f}"


def nanogpt_step(model: nn.Module, tokens: Path) -> Callable[[], None]:
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

    ahead, count = batch(), 0

    def step() -> None:
        nonlocal ahead, count
        for group in optimizer.param_groups:
            group["lr"] = LR
        _, loss = model(*ahead)
        ahead = batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if count % LOG_EVERY == 0:
            loss.item()
        count += 1

    return step


def our_step(trainer: loop.Trainer) -> Callable[[], None]:
    """A closure that goes once through the loop of ``Trainer.train``, where neither evaluation nor saving is due."""

    def step() -> None:
        assert trainer.train_step(trainer.progress.step) == (None, False)
        trainer.progress.step += 1
        trainer.check_guard()
        trainer.metrics.write(trainer.progress.step, trainer.clock.seconds)

    return step


def contender(orders: multiprocessing.connection.Connection, name: str, args: argparse.Namespace, folder: Path) -> None:
    """In a process of its own: prepare one of the two, then time as many steps as are ordered, until none are."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=1_000_000, dtype=np.uint16)
    tokens.tofile(folder / "train.bin")
    if name == "ours":
        trainer = our_trainer(folder, tokens)
        orders.send(check_same_work(nanogpt_model(args.nanogpt), trainer.model))
        step = our_step(trainer)
    else:
        step = nanogpt_step(nanogpt_model(args.nanogpt), folder / "train.bin")
    while steps := orders.recv():
        begin = time.process_time()
        for _ in range(steps):
            step()
        orders.send((time.process_time() - begin) / steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--blocks", type=count, default=20, help="pairs of blocks")
    parser.add_argument("--steps", type=count, default=20, help="steps in a block")
    parser.add_argument("--threads", type=count, default=1)
    args = parser.parse_args()
    if not (args.nanogpt / "model.py").is_file():
        raise SystemExit(f"error: --nanogpt={args.nanogpt} holds no model.py: give a checkout of karpathy/nanoGPT")
    spawn, lines = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nanoGPT", "ours"):
            lines[name], end = spawn.Pipe()
            (Path(folder) / name).mkdir()
            spawn.Process(target=contender, args=(end, name, args, Path(folder) / name), daemon=True).start()
            end.close()
        print(lines["ours"].recv(), flush=True)
        pairs = []
        for index in range(-1, args.blocks):  # the first is for warming up
            times = {name: ask(lines[name], args.steps) for name in list(lines)[:: 1 if index % 2 else -1]}
            pairs.append((times["nanoGPT"], times["ours"]))
        for line in lines.values():
            line.send(0)
    report(pairs[1:])


def ask(line: multiprocessing.connection.Connection, steps: int) -> float:
    """Seconds per step."""
    line.send(steps)
    return line.recv()


def report(pairs: list[tuple[float, float]]) -> None:
    ratios = sorted(theirs / ours for theirs, ours in pairs)
    for name, column in (("nanoGPT", 0), ("ours", 1)):
        print(f"{name:8} {1e3 * statistics.median(pair[column] for pair in pairs):7.2f} ms per step (median)")
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    print(f"speed ratio, nanoGPT's time / ours: median {statistics.median(ratios):.3f}, "
          f"80% of {len(ratios)} pairs within {low:.3f} to {high:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
