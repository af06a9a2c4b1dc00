"""What a batch is: shards of tokens, where they come from, and which of them a step reads.

The names below are imported when first used: processes that only tokenize do without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# ruff: noqa: F401
if TYPE_CHECKING:
    from data.build import prepare
    from data.config import DataConfig
    from data.loader import IGNORE_INDEX, Loader, document_ids, eval_batches
    from data.split import TrainValSplit, open_split
    from data.tokenizer import load_tokenizer

_NAMES = {
    "build": ["prepare"],
    "config": ["DataConfig"],
    "loader": ["IGNORE_INDEX", "Loader", "document_ids", "eval_batches"],
    "split": ["TrainValSplit", "open_split"],
    "tokenizer": ["load_tokenizer"],
}
__all__ = [name for names in _NAMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"data.{module}"), name)
    raise AttributeError(f"module 'data' has no attribute {name!r}")
