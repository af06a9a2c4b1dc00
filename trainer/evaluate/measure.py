"""What an evaluation during training measures.  A further number goes into the dictionary that ``evaluate`` returns:
the record, W&B and the speedrun page take every key of it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from common import UserError
from data import TrainValSplit, load_tokenizer
from trainer.config import Config
from trainer.evaluate.generate import Sampling, complete, printable
from trainer.evaluate.validation import Batch, Bins, validation_losses
from trainer.parallel import Parallel, unwrap


def evaluate(
    config: Config, model: nn.Module, parallel: Parallel, split: TrainValSplit, batches: Iterable[Batch], bins: Bins
) -> dict[str, Any]:
    """On all ranks: ``val/loss`` [nats per token], ``perf/peak_memory_bytes``, the largest of any rank so far, the loss
    of every bin, such as ``val/by_position/1_of_4``, ``sample``, text after ``eval.sample``, and scores such as
    ``hellaswag/acc`` of ``eval.tasks``."""
    loss, by_bin = validation_losses(model, parallel, batches, bins)
    mine = torch.tensor([parallel.peak_memory_bytes()], dtype=torch.int64, device=parallel.device)
    memory = int(parallel.accelerator.gather(mine).max())
    measured: dict[str, Any] = {"val/loss": loss, "perf/peak_memory_bytes": memory}
    measured |= by_bin
    if config.eval.sample is not None:
        measured["sample"] = sample(config, config.eval.sample, model, parallel, split)
    if config.eval.tasks:
        measured |= scores(config, model, parallel, split)
    return measured


def sample(config: Config, prompt: str, model: nn.Module, parallel: Parallel, split: TrainValSplit) -> str:
    """The prompt and the text that the model goes on with: the same draws at every evaluation.

    No rank stops at the end of the text: in a sharded model's forward pass all meet, as often.
    """
    tokenizer, count = load_tokenizer(split.tokenizer), config.eval.sample_tokens
    # Compiled blocks would be compiled anew for every length.
    with parallel.evaluation(model), torch.compiler.set_stance("force_eager"):
        [text] = complete(unwrap(model), tokenizer, prompt, count, Sampling(), seed=config.seed)
    return printable(text)


def scores(config: Config, model: nn.Module, parallel: Parallel, split: TrainValSplit) -> dict[str, float]:
    """Of ``eval.tasks``. Raises UserError: the harness is absent, there is no such task, or its set cannot be had."""
    tasks = config.eval.tasks
    try:
        from trainer.evaluate.harness import score
    except ImportError as error:
        mend = "pip install '.[eval]', or leave it out"
        raise UserError(f"eval.tasks={tasks}, but {error.name} is not installed: {mend}") from None
    with parallel.evaluation(model), torch.compiler.set_stance("force_eager"):
        tokenizer = load_tokenizer(split.tokenizer)
        try:
            return score(unwrap(model), tokenizer, tasks, config.eval.task_examples, parallel=parallel)[0]
        except UserError as error:
            raise UserError(f"eval.tasks={tasks}: {error}") from None
