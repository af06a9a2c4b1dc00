"""What a batch is: shards of tokens, where they come from, and which of them a step reads.

The names below are imported when first used: processes that only tokenize do without torch.
"""

from __future__ import annotations

import importlib

_WHERE = {
    "IGNORE_INDEX": "loader",
    "DataConfig": "config",
    "Loader": "loader",
    "Split": "split",
    "document_ids": "loader",
    "eval_batches": "loader",
    "load_tokenizer": "tokenizer",
    "open_split": "split",
    "prepare": "split",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"data.{_WHERE[name]}"), name)
