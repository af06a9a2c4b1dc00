"""Text and ready-made shards from the Hugging Face hub: FineWeb, FineWeb-Edu, or any dataset with a column `text`.

Raw text is streamed by `datasets` and tokenized here; ready-made shards are fetched by `huggingface_hub`. What has
been fetched from a hub belongs to one commit of its repository, which the manifest records.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from common import UserError
from data import manifest
from data.build import locked
from data.config import DataConfig
from data.documents import Batch, Item, batches, decode_text
from data.shards import open_shard
from data.tokenizer import load_tokenizer


class HubText:
    """The documents of `hub:OWNER/DATASET[:SUBSET]`, split train, at one revision."""

    identity = None  # the revision says it all

    def __init__(self, source: str, revision: str | None) -> None:
        self.name = source
        self.repository, _, subset = source.removeprefix("hub:").partition(":")
        self.subset = subset or None
        self.revision = commit(self.repository, revision)

    def batches(self, cursor: dict | None) -> Iterator[Batch]:
        """From `cursor`, or the beginning. Raises UserError if the hub cannot be reached."""
        return batches(self._items(cursor or {"row": 0, "state": None}))

    def _items(self, cursor: dict) -> Iterator[Item]:
        with asking(self.repository):
            stream = open_stream(self.repository, self.subset, self.revision)
            if cursor["state"] is not None:
                stream.load_state_dict(cursor["state"])
            total = stream.info.splits["train"].num_examples if stream.info.splits else None
            for row, document in enumerate(stream, cursor["row"] + 1):
                here = partial(_cursor, row, stream)
                yield Item(decode_text, document.get("text"), here, row / total if total else None)


def _cursor(row: int, stream) -> dict:
    return {"row": row, "state": stream.state_dict()}


def open_stream(repository: str, subset: str | None, revision: str):
    """A streaming dataset of the hub: an iterable of rows that can be continued."""
    import datasets

    return datasets.load_dataset(repository, name=subset, split="train", streaming=True, revision=revision)


def commit(repository: str, revision: str | None) -> str:
    """The commit that a branch, tag or None (the newest) stands for. Raises UserError if the hub cannot be reached."""
    import huggingface_hub

    if revision and len(revision) == 40:
        return revision
    with asking(repository):
        return huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha


def download(config: DataConfig) -> None:
    """Fetch ready-made shards into `config.folder`: validation and the first `config.tokens` tokens of training.

    Call it on one process of a machine; processes that share a disk wait for each other. Shards that are there
    already are kept. Raises UserError: hub not reachable, a corrupt shard, a folder with other content.
    """
    folder = config.folder
    with locked(folder, wait=True):
        held = manifest.read_manifest(folder)
        if held is not None:
            if held["settings"].get("pretokenized") != config.pretokenized:
                return  # prepared here, which is as good; open_split checks it
            enough = held["settings"]["tokens"] is None or config.tokens and config.tokens <= held["tokens"]["train"]
            if enough:
                return
        _download(config, folder, config.revision or (held or {}).get("revision"))


def _download(config: DataConfig, folder: Path, revision: str | None) -> None:
    tokenizer = load_tokenizer(config.tokenizer or "gpt2")
    repository, revision = config.pretokenized, commit(config.pretokenized, revision)
    names = sorted(name for name in list_files(repository, revision) if name.endswith(".bin"))
    val = [name for name in names if manifest.split_of(name) == "val"]
    train = [name for name in names if "_train_" in name]
    if not val or not train:
        raise UserError(f"data.pretokenized={repository}: holds no *_train_*.bin and *_val_*.bin")
    fetched, left = [], config.tokens
    for name in val + train:
        if name in train and left is not None and left <= 0:
            break
        fetched.append(_fetch(repository, name, revision, folder))
        left = left if name in val or left is None else left - len(open_shard(folder / name))
    manifest.write_manifest(
        folder,
        {
            "name": config.name,
            "source": f"hub:{repository}",
            "revision": revision,
            "settings": {"pretokenized": repository, "tokens": config.tokens},
            "tokenizer": {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "sha256")},
            "documents": {},
            "shards": [manifest.describe_shard(file) for file in fetched],
        },
    )


def _fetch(repository: str, name: str, revision: str, folder: Path) -> Path:
    import huggingface_hub

    try:
        open_shard(folder / name)  # there from an earlier call: the hub's client moves files only when complete
        return folder / name
    except UserError:
        pass
    with asking(repository):
        path = huggingface_hub.hf_hub_download(
            repository, name, repo_type="dataset", revision=revision, local_dir=folder, force_download=True
        )
    open_shard(path)
    return Path(path)


def list_files(repository: str, revision: str) -> list[str]:
    """The files of a dataset repository on the hub."""
    import huggingface_hub

    with asking(repository):
        return huggingface_hub.HfApi().list_repo_files(repository, repo_type="dataset", revision=revision)


@contextmanager
def asking(repository: str):
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
