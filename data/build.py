"""Text into shards: read in order, tokenize on several threads, write in order, survive a kill at any moment.

Every document becomes `[end of text] + encode_ordinary(text)`, as in llm.c's and modded-nanogpt's fineweb.py, and
runs across shard ends. Beside the shards, `progress.json` says how far they go; it is replaced every few seconds,
after the tokens that it counts are on disk. A restart cuts the open shard back to it and continues there.

Threads do, not processes: tiktoken lets go of the interpreter lock while it encodes.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, write_json
from data import manifest
from data.config import DataConfig
from data.documents import BadDocument, Batch
from data.local import LocalText
from data.shards import token_dtype
from data.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
from data.writer import ShardWriter, TooLittleText

PROGRESS = "progress.json"
CHECKPOINT_SECONDS = 2.0  # work lost to a kill, at most
END_OF_TEXT = "<|endoftext|>"
HUGE = 1_000_000  # characters of a document that is counted as huge

Report = Callable[[int, float | None], None]  # (tokens so far, fraction of the work or None if unknown)


class Encoded(NamedTuple):
    tokens: np.ndarray  # of the shards' dtype
    starts: list[int]  # where each written document begins
    counts: Counter  # bad documents by kind


def build(config: DataConfig, report: Report = lambda tokens, fraction: None) -> dict:
    """Prepare `config.folder` from `config.source`, or continue; the manifest. Nothing is done if it is complete.

    Raises UserError: no or unreadable source, a folder with other content, another preparation at work in it.
    """
    config.check()
    folder = config.folder
    with locked(folder):
        done = manifest.read_manifest(folder)
        progress = done or _read_progress(folder)
        source = open_source(config, progress)
        tokenizer = load_tokenizer(config.tokenizer or "gpt2")
        identity = _identity(config, source, tokenizer)
        if progress is None:
            if any(folder.glob("*.bin")):
                raise UserError(f"data.dir={folder}: holds shards of unknown origin; choose another or empty it")
            progress = {**identity, "cursor": None, "position": 0, "documents": {}}
            write_json(folder / PROGRESS, progress)
        _check_same(folder, progress, identity)
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


def open_source(config: DataConfig, progress: dict | None):
    """The text that `data.source` names. A hub source stays at the revision with which it was begun."""
    if config.source.startswith("hub:"):
        from data.fineweb import HubText

        return HubText(config.source, config.revision or (progress or {}).get("revision"))
    if config.source in ("", "shards", "sample"):
        raise UserError(
            f"data.source={config.source!r}: nothing to prepare; name a folder: data=local data.source=FOLDER"
        )
    return LocalText(config.source)


def _run(config: DataConfig, source, tokenizer, progress: dict, report: Report) -> dict:
    folder, first = config.folder, config.val_tokens or config.shard_tokens
    limit = None if config.tokens is None else first + config.tokens
    dtype = token_dtype(tokenizer.vocab_size)
    writer = ShardWriter(folder, config.name, dtype, first, config.shard_tokens, progress["position"])
    counts, saved = Counter(progress["documents"]), time.monotonic()
    try:
        for batch, encoded in _encode_in_order(source, progress["cursor"], tokenizer, dtype, config.workers):
            if limit is not None and writer.position >= limit:
                break
            room = len(encoded.tokens) if limit is None else limit - writer.position
            writer.write(encoded.tokens[:room])
            counts.update(encoded.counts)
            counts["written"] += sum(start < room for start in encoded.starts)
            progress |= {"cursor": batch.cursor, "position": writer.position, "documents": dict(counts)}
            if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                writer.sync()
                write_json(folder / PROGRESS, progress)
                saved = time.monotonic()
            report(writer.position, batch.fraction if limit is None else writer.position / limit)
        if not counts["written"]:
            bad = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count) or "no row at all"
            raise TooLittleText(
                f"data.source={config.source} holds no document with a text ({bad}): the column must be called `text`"
            )
        files = writer.finish(hold_out=config.val_tokens is None)
    finally:
        writer.close()
    content = {key: progress[key] for key in ("name", "source", "revision", "settings", "tokenizer", "documents")}
    return manifest.write_manifest(folder, {**content, "shards": [manifest.describe_shard(file) for file in files]})


def _encode_in_order(
    source, cursor: dict | None, tokenizer, dtype: np.dtype, workers: int | None
) -> Iterator[tuple[Batch, Encoded]]:
    """The batches of the source, tokenized several at a time, in their order."""
    workers = workers or len(os.sched_getaffinity(0))
    waiting: deque = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        try:
            for batch in source.batches(cursor):
                waiting.append((batch, pool.submit(encode, tokenizer, batch.items, dtype)))
                if len(waiting) > 2 * workers:  # enough to keep every thread busy, little enough to hold in memory
                    batch, future = waiting.popleft()
                    yield batch, future.result()
            while waiting:
                batch, future = waiting.popleft()
                yield batch, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def encode(tokenizer: BPETokenizer | ByteTokenizer, items: list, dtype: np.dtype) -> Encoded:
    """Tokenize a batch's documents. Bad ones are counted, and left out where they have no text; see docs/data.md."""
    pieces, starts, length, counts = [], [], 0, Counter()
    start = np.array([tokenizer.eos], dtype)
    for decode, raw in items:
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
    return Encoded(np.concatenate(pieces) if pieces else np.empty(0, dtype), starts, counts)


def _identity(config: DataConfig, source, tokenizer) -> dict:
    """What decides the bytes: a folder is continued only under the same."""
    return {
        "name": config.name,
        "source": source.name,
        "revision": source.revision,
        "settings": {
            "content": source.identity,
            "tokens": config.tokens,
            "shard_tokens": config.shard_tokens,
            "val_tokens": config.val_tokens,
        },
        "tokenizer": {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "sha256")},
    }


def _check_same(folder: Path, before: dict, now: dict) -> None:
    before, now = ({**each, **each.get("settings", {})} for each in (before, now))
    for key in now:
        if key != "settings" and before.get(key) != now[key]:
            raise UserError(
                f"data.dir={folder}: holds data prepared with another {key} ({before.get(key)}, now {now[key]}); "
                "choose another data.dir or empty it"
            )


def _read_progress(folder: Path) -> dict | None:
    path = folder / PROGRESS
    try:
        progress = json.loads(path.read_bytes())
        known = isinstance(progress["position"], int) and isinstance(progress["documents"], dict)
        if not known or not isinstance(progress["cursor"], dict | None):
            raise TypeError
        return progress
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: corrupt; empty the folder and start again") from None


@contextmanager
def locked(folder: Path, wait: bool = False):
    """Hold a folder, made if needed, for oneself; the lock goes with the process, however it ends.

    A folder that is still empty at the end is removed. Raises UserError if another process holds it and not `wait`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"data.dir={folder}: cannot be used ({error.strerror})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        raise UserError(f"data.dir={folder}: another preparation is at work there") from None
    finally:
        with suppress(OSError):
            folder.rmdir()
        os.close(descriptor)
