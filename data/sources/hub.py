"""The Hugging Face hub: FineWeb, FineWeb-Edu, or any dataset with a column `text`, streamed by `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from common import UserError
from data.documents import Batch, Cursor, Document, batch_documents


class HubText:
    """The documents of `hub:OWNER/DATASET[:SUBSET]`, split train, at one commit of the repository."""

    identity = None  # the commit says it all

    def __init__(self, source: str, revision: str | None) -> None:
        self.name = source
        self.repository, _, subset = source.removeprefix("hub:").partition(":")
        self.subset = subset or None
        self.revision = resolve_revision(self.repository, revision)

    def batches(self, cursor: Cursor | None) -> Iterator[Batch]:
        """From `cursor`, or the beginning. Raises UserError if the hub cannot be reached."""
        return batch_documents(self._documents(cursor or {"row": 0, "state": None}))

    def _documents(self, cursor: Cursor) -> Iterator[tuple[Document, Callable[[], Cursor], float | None]]:
        from datasets import load_dataset  # type: ignore[import-untyped]

        keys = {"name": self.subset, "split": "train", "streaming": True, "revision": self.revision}
        with hub_errors(self.repository):
            stream = load_dataset(self.repository, **keys)
            if cursor["state"] is not None:
                stream.load_state_dict(cursor["state"])
            total = stream.info.splits["train"].num_examples if stream.info.splits else None
            for row, document in enumerate(stream, cursor["row"] + 1):
                yield Document(document.get("text")), partial(_cursor, row, stream), row / total if total else None


def _cursor(row: int, stream: Any) -> Cursor:
    return {"row": row, "state": stream.state_dict()}


def resolve_revision(repository: str, revision: str | None) -> str:
    """The commit that a branch, tag or None (the newest) stands for. Raises UserError if the hub cannot be reached."""
    import huggingface_hub

    if revision and len(revision) == 40:
        return revision
    with hub_errors(repository):
        return str(huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha)


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Turns whatever the hub's clients and the network raise into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # httpx, requests, datasets and OS errors have no common ancestor below this
        reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        raise UserError(
            f"{repository}: not available from the Hugging Face hub ({type(error).__name__}: {reason}); the same "
            "command continues when it is; local text can be prepared with data=local data.source=FOLDER"
        ) from None
