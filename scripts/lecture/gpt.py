"""Trains a very small GPT on the sample text, with the real configuration, model, loader and optimizers."""

from collections.abc import Callable
from dataclasses import asdict

import torch

from data import Loader, eval_batches, open_split, prepare
from optim import routing
from trainer.config import Config
from trainer.launch import load_config
from trainer.model import GPT
from trainer.parallel import initialise

SMALL = (
    "experiment=smoke",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=64",
    "train.seq_len=64",
    "train.batch_tokens=1024",
    "eval.tokens=8192",
    # What is not a matrix has AdamW as here, whatever the presets are tuned to: claims are about the matrices.
    "optim.embedding.lr=0.01",
    "optim.head.lr=0.004",
    "optim.scalar.lr=0.01",
)


def compose(*overrides: str) -> Config:
    """The validated config of `python train.py` with SMALL and these overrides."""
    return load_config([*SMALL, *overrides])


def train(
    *overrides: str,
    steps: int,
    evaluate_every: int,
    after_step: Callable[[int, GPT], None] = lambda step, model: None,
) -> list[tuple[int, float]]:
    """Train for `steps` updates; returns (step, validation loss in nats per byte) from step 0 on.

    after_step(step, model) follows every update, step counting from 1.
    """
    config = compose(f"train.steps={steps}", *overrides)
    prepare(config.data)
    split = open_split(config.data)
    model = GPT(config.model, split.vocab_size, config.train.seq_len)
    initialise(model, config.seed)
    optimizers = routing.build_from_config(model, asdict(config.optim))
    multiplier = config.schedule.multiplier("matrix", steps)
    sequences = config.train.batch_tokens // config.train.seq_len
    loader = Loader(
        split.train,
        seq_len=config.train.seq_len,
        batch_sequences=sequences,
        order=config.data.order,
        seed=config.seed,
        vocab_size=split.vocab_size,
    )
    curve = [(0, validation_loss(model, split, config))]
    for step in range(1, steps + 1):
        optimizers.set_lr(multiplier(step - 1))
        for inputs, targets in loader.batch(step - 1):
            (model(inputs, targets) / config.train.batch_tokens).backward()
        optimizers.step()
        optimizers.zero_grad()
        after_step(step, model)
        if step % evaluate_every == 0 or step == steps:
            curve.append((step, validation_loss(model, split, config)))
    loader.close()
    return curve


@torch.no_grad()
def validation_loss(model: GPT, split, config: Config) -> float:
    batches = eval_batches(split.val, seq_len=config.train.seq_len, tokens=config.eval.tokens, micro_batch=64)
    model.eval()
    loss = sum(model(inputs, targets).item() for inputs, targets in batches) / config.eval.tokens
    model.train()
    return loss
