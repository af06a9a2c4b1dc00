"""Ready-made shards from the Hugging Face hub, such as the speedrun's, fetched by `huggingface_hub`.

What has been fetched belongs to one commit of its repository, which the manifest records.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from common import UserError
from data import manifest
from data.config import DataConfig
from data.lock import folder_lock
from data.shards import open_shard, split_of
from data.sources.hub import hub_errors, resolve_revision
from data.tokenizer import load_tokenizer


def download(config: DataConfig) -> None:
    """Fetch ready-made shards into `config.folder`: validation and the first `config.tokens` tokens of training.

    Call it on one process of a machine; processes that share a disk wait for each other. Shards that are there
    already are kept. Raises UserError: hub not reachable, a corrupt shard, a folder with other content.
    """
    if _is_enough(config, manifest.read_manifest(config.folder)):
        return
    with folder_lock(config.folder, wait=True):
        existing = manifest.read_manifest(config.folder)  # another process may have written it meanwhile
        if not _is_enough(config, existing):
            _download(config, config.revision or (existing or {}).get("revision"))


def _is_enough(config: DataConfig, existing: dict[str, Any] | None) -> bool:
    if existing is None:
        return False
    settings = existing["settings"]
    if settings.get("pretokenized") != config.pretokenized:
        return True  # prepared here, which is as good; open_split checks it
    return settings["tokens"] is None or bool(config.tokens and config.tokens <= existing["tokens"]["train"])


def _download(config: DataConfig, revision: str | None) -> None:
    from huggingface_hub import HfApi

    folder, repository = config.folder, config.pretokenized
    assert repository is not None  # config.check() has seen to it
    tokenizer = load_tokenizer(config.tokenizer or "gpt2")
    revision = resolve_revision(repository, revision)
    with hub_errors(repository):
        files = HfApi().list_repo_files(repository, repo_type="dataset", revision=revision)
    val, train = (sorted(name for name in files if split_of(name) == split) for split in ("val", "train"))
    if not val or not train:
        raise UserError(f"data.pretokenized={repository}: holds no *_train_*.bin and *_val_*.bin; name another")
    fetched, left = [], config.tokens
    for name in val + train:
        if name in train and left is not None and left <= 0:
            break
        fetched.append(_fetch(repository, name, revision, folder))
        left = left if name in val or left is None else left - len(open_shard(folder / name))
    settings = {"pretokenized": repository, "tokens": config.tokens}
    identity = manifest.describe(config.name, f"hub:{repository}", revision, settings, tokenizer)
    manifest.write_manifest(folder, identity, {}, fetched)


def _fetch(repository: str, name: str, revision: str, folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    path = folder / name
    with suppress(UserError):
        open_shard(path)  # there from an earlier call: the hub's client moves files only when complete
        return path
    with hub_errors(repository):
        hf_hub_download(repository, name, repo_type="dataset", revision=revision, local_dir=folder, force_download=True)
    open_shard(path)
    return path
