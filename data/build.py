"""Text into shards: read in order, tokenize on several threads, write in order, survive a kill at any moment.

Every document becomes `[end of text] + encode_ordinary(text)`, as in llm.c's and modded-nanogpt's fineweb.py, and
runs across shard ends. Beside the shards, `progress.json` says how far they go; it is replaced every few seconds,
after the tokens that it counts are on disk. A restart cuts the open shard back to it and continues there.
Threads tokenize, not processes: tiktoken lets go of the interpreter lock while it encodes.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import UserError, write_json
from data import manifest
from data.config import DataConfig
from data.documents import BadDocument, Batch, Document, Source
from data.download import download
from data.lock import folder_lock
from data.shards import token_dtype
from data.sources import open_source
from data.spread import SpreadWriter
from data.tokenizer import Tokenizer, load_tokenizer
from data.writer import ShardWriter, TooLittleText

PROGRESS = "progress.json"
CHECKPOINT_SECONDS = 2.0  # work lost to a kill, at most
END_OF_TEXT = "<|endoftext|>"
HUGE = 1_000_000  # characters of a document that is counted as huge
MENDS = {
    "missing_text": "a row needs a column `text` that holds strings",
    "invalid_utf8": "text must be UTF-8: convert it, as `iconv -f LATIN1 -t UTF-8` does",
    "nul_bytes": "a .txt with NUL bytes is UTF-16, to be converted to UTF-8, or no text",
    "invalid_json": "each line must be one JSON object",
}

Report = Callable[[int, float | None], None]  # (tokens so far, fraction of the work or None if unknown)


class EncodedBatch(NamedTuple):
    tokens: np.ndarray  # of the shards' dtype
    starts: list[int]  # where each written document begins
    counts: Counter[str]  # bad documents by kind


def prepare(config: DataConfig) -> None:
    """What training can do by itself before it opens the shards; safe to repeat and to run in several processes.

    data=sample is written on first use, and data.download=true fetches ready-made shards. Everything else is left
    to scripts/prepare_data.py. Raises UserError.
    """
    config.check()
    try:
        if config.source == "sample":
            build(config, wait=True)
        elif config.download:
            download(config)
    except OSError as error:
        raise UserError(f"data.dir={config.folder}: cannot be written ({error.strerror}); choose another") from None


def build(config: DataConfig, report: Report | None = None, wait: bool = False) -> dict[str, Any]:
    """Prepare `config.folder` from `config.source`, or continue; the manifest. Nothing is done if it is complete.

    Raises UserError: no or unreadable source, a folder with other content; another preparation at work in it, unless
    `wait` lets that one finish first.
    """
    config.check()
    folder = config.folder
    done = manifest.read_manifest(folder)
    if done is not None and not (folder / PROGRESS).exists():
        _start(config, done)
        return done  # without a lock: a folder that others have prepared may be read-only
    with folder_lock(folder, wait):
        done = manifest.read_manifest(folder)
        source, tokenizer, progress = _start(config, done or _read_progress(folder))
        if done is None:
            try:
                done = _run(config, source, tokenizer, progress, report)
            except TooLittleText:
                _clear(folder)  # or the mended command would meet the settings of this one
                raise
        _clear(folder)
    return done


def _clear(folder: Path) -> None:
    """Remove what only an unfinished preparation needs."""
    for leftover in [*folder.glob("*.part"), *folder.glob(".*.tmp"), folder / PROGRESS]:
        leftover.unlink(missing_ok=True)


def _start(config: DataConfig, progress: dict[str, Any] | None) -> tuple[Source, Tokenizer, dict[str, Any]]:
    """Source, tokenizer and progress of a preparation, new or continued. Raises UserError if it is another one's."""
    source = open_source(config, (progress or {}).get("revision"))
    tokenizer = load_tokenizer(config.tokenizer or "gpt2")
    limits = {key: getattr(config, key) for key in ("tokens", "shard_tokens", "val_tokens")}
    settings = {"content": source.identity, **limits, **({"validation": "spread"} if _spreads(config, source) else {})}
    identity = manifest.describe(config.name, source.name, source.revision, settings, tokenizer)
    if progress is None:
        if any(config.folder.glob("*.bin")):
            raise UserError(f"data.dir={config.folder}: holds shards of unknown origin; choose another or empty it")
        unread = getattr(source, "unread", {})  # files, by the reason
        progress = {**identity, "cursor": None, "position": 0, "documents": dict(unread)}
    _check_same_identity(config.folder, progress, identity)
    return source, tokenizer, progress


def _run(
    config: DataConfig, source: Source, tokenizer: Tokenizer, progress: dict[str, Any], report: Report | None
) -> dict[str, Any]:
    folder, dtype = config.folder, token_dtype(tokenizer.vocab_size)
    val_tokens = config.val_tokens or _count_val_tokens(source, tokenizer, dtype)
    first = val_tokens or config.shard_tokens
    limit = None if config.tokens is None else first + config.tokens
    place = (folder, config.name, dtype)
    writer: ShardWriter | SpreadWriter
    write_json(folder / PROGRESS, progress)  # from now on the folder is this preparation's
    if _spreads(config, source):
        done = (progress["position"], progress.get("val", 0))
        writer = SpreadWriter(*place, val_tokens, config.shard_tokens, config.tokens, *done)
    else:
        writer = ShardWriter(*place, first, config.shard_tokens, progress["position"], limit)
    counts, saved = Counter(progress["documents"]), time.monotonic()
    try:
        for batch, encoded in _encode_in_order(source, progress["cursor"], tokenizer, dtype, config.workers):
            if writer.position == writer.limit:
                break
            span = (progress.get("fraction") or 0.0, 1.0 if batch.fraction is None else batch.fraction)
            counts["written"] += writer.write_documents(encoded.tokens, encoded.starts, span)
            counts.update(encoded.counts)
            progress |= {"cursor": batch.cursor, "fraction": batch.fraction, "documents": dict(counts), **writer.state}
            if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                writer.sync()
                write_json(folder / PROGRESS, progress)
                saved = time.monotonic()
            if report is not None:
                report(writer.position, writer.position / writer.limit if writer.limit else batch.fraction)
        if not counts["written"]:
            bad = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count) or "no row at all"
            mends = "; ".join(mend for kind, mend in MENDS.items() if counts[kind]) or "name another"
            raise TooLittleText(f"data.source={config.source} holds no text ({bad}): {mends}")
        files = writer.finish(hold_out=val_tokens is None)
    finally:
        writer.close()
    identity = {key: progress[key] for key in ("name", "source", "revision", "settings", "tokenizer")}
    return manifest.write_manifest(folder, identity, progress["documents"], files)


def _spreads(config: DataConfig, source: Source) -> bool:
    """Whether validation is dealt out; a source's own validation documents come first."""
    return config.validation == "spread" and not hasattr(source, "val_documents")


def _count_val_tokens(source: Source, tokenizer: Tokenizer, dtype: np.dtype) -> int | None:
    """Tokens of the documents that the source itself holds out for validation, None if it holds out none."""
    count = getattr(source, "val_documents", None)
    if count is None:
        return None
    documents = (document for batch in source.batches(None) for document in batch.documents)
    return len(encode(tokenizer, list(islice(documents, count)), dtype).tokens)


def _encode_in_order(
    source: Source, cursor: dict[str, Any] | None, tokenizer: Tokenizer, dtype: np.dtype, workers: int | None
) -> Iterator[tuple[Batch, EncodedBatch]]:
    """The batches of the source, tokenized several at a time, in their order."""
    workers = workers or len(os.sched_getaffinity(0))
    waiting: deque[tuple[Batch, Future[EncodedBatch]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        try:
            for batch in source.batches(cursor):
                waiting.append((batch, pool.submit(encode, tokenizer, batch.documents, dtype)))
                if len(waiting) > 2 * workers:  # enough to keep every thread busy, little enough to hold in memory
                    batch, future = waiting.popleft()
                    yield batch, future.result()
            while waiting:
                batch, future = waiting.popleft()
                yield batch, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def encode(tokenizer: Tokenizer, documents: list[Document], dtype: np.dtype) -> EncodedBatch:
    """Tokenize a batch's documents. Bad ones are counted, and left out where they have no text; see docs/data.md."""
    pieces: list[np.ndarray] = [np.empty(0, dtype)]
    starts, length, counts = list[int](), 0, Counter[str]()
    start = np.array([tokenizer.eos], dtype)
    for raw, decode in documents:
        try:
            text = decode(raw)
            tokens = tokenizer.encode_numpy(text)
        except BadDocument as bad:
            counts[bad.args[0]] += 1
            continue
        except ValueError:  # tiktoken's regex gives up on a million white spaces in a row
            counts["unencodable"] += 1
            continue
        counts += Counter(empty=not text, huge=len(text) >= HUGE, special_text=END_OF_TEXT in text)
        starts.append(length)
        length += 1 + len(tokens)
        pieces += [start, tokens.astype(dtype)]
    return EncodedBatch(np.concatenate(pieces), starts, counts)


def _check_same_identity(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """A folder is continued only under what decided its bytes before."""
    before, now = (
        {key: each[key] for key in ("name", "source", "revision")}
        | {
            "tokenizer": each["tokenizer"]["name"],
            "vocabulary": each["tokenizer"]["sha256"],
            "validation": "first",
            **each["settings"],
        }
        for each in (before, now)
    )
    for key in now:
        if key in before and before[key] != now[key]:  # older manifests of the sample have no settings
            change = f"with another {key} ({before[key]}, now {now[key]})"
            raise UserError(f"data.dir={folder}: holds data prepared {change}; choose another or empty it")


def _read_progress(folder: Path) -> dict[str, Any] | None:
    path = folder / PROGRESS
    try:
        progress = json.loads(path.read_bytes())
        valid = isinstance(progress["position"], int) and isinstance(progress["documents"], dict)
        if not valid or not isinstance(progress["cursor"], dict | None):
            raise TypeError
        return progress
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: corrupt; empty the folder and start again") from None
