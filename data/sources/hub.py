"""The Hugging Face hub: FineWeb, FineWeb-Edu, or any dataset with a column `text`, streamed by `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
        from datasets import load_dataset  # type: ignore[import-untyped]

        keys = {"name": self.subset, "split": "train", "streaming": True, "revision": self.revision}
        with hub_errors(self.repository):
            stream = load_dataset(self.repository, **keys)
            if cursor is not None:
                stream.load_state_dict(cursor["state"])
            total = stream.info.splits["train"].num_examples if stream.info.splits else None
            rows = enumerate(stream, 1 if cursor is None else cursor["row"] + 1)
            documents = ((Document(row.get("text")), {"row": n}, n / total if total else None) for n, row in rows)
            for batch in batch_documents(documents):  # the stream stands just behind the batch
                yield batch._replace(cursor={**batch.cursor, "state": stream.state_dict()})


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
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}"
        advice = "the same command continues when it is; data=local data.source=FOLDER prepares local text"
        raise UserError(f"{repository}: not available from the Hugging Face hub ({reason}); {advice}") from None
