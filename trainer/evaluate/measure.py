"""What an evaluation during training measures.  A further number goes into the dictionary that ``evaluate`` returns:
the record, W&B and the speedrun page take every key of it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    """Of ``eval.tasks``. Raises UserError as ``check_tasks`` does."""
    with _naming_tasks(config), parallel.evaluation(model), torch.compiler.set_stance("force_eager"):
        from trainer.evaluate.harness import score

        tokenizer = load_tokenizer(split.tokenizer)
        return score(unwrap(model), tokenizer, config.eval.tasks, config.eval.task_examples, parallel=parallel)[0]


def check_tasks(config: Config) -> None:
    """Raises UserError: ``eval.tasks`` need what is not installed, there is no such task, or its set cannot be had."""
    if not config.eval.tasks:
        return
    with _naming_tasks(config):
        from trainer.evaluate.harness import load_tasks

        load_tasks(tuple(config.eval.tasks))


@contextmanager
def _naming_tasks(config: Config) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        mend = "pip install '.[eval]', or leave it out"
        raise UserError(f"eval.tasks={config.eval.tasks}, but {error.name} is not installed: {mend}") from None
    except UserError as error:
        raise UserError(f"eval.tasks={config.eval.tasks}: {error}") from None
