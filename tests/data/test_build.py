"""Text into shards: the bytes that the speedrun's script would write, whatever the text comes in."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data import manifest
from data.build import build, encode
from data.config import DataConfig
from data.documents import Document, decode_json
from data.lock import folder_lock
from data.shards import open_shard
from data.sources.local import LocalText
from data.split import open_split
from data.tokenizer import load_tokenizer


def stream(texts: list[str], encoding) -> list[int]:
    """Every document behind its end-of-text token, one after the other."""
    return [token for text in texts for token in [encoding.eot_token, *encoding.encode_ordinary(text)]]


def speedrun_files(tokens: list[int], size: int) -> dict[str, bytes]:
    """What fineweb.py writes: shards of `size` tokens, the first for validation, the last shorter."""
    files = {}
    for index, start in enumerate(range(0, len(tokens), size)):
        part = tokens[start : start + size]
        header = struct.pack("<256i", 20240520, 1, len(part), *[0] * 253)
        name = f"local_{'train' if index else 'val'}_{index:06d}.bin"
        files[name] = header + struct.pack(f"<{len(part)}H", *part)
    return files


def written(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.bin")}


def as_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_source(folder: Path, rows: list[dict], form: str) -> None:
    half = len(rows) // 2
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows[:half]), folder / "000.parquet", row_group_size=700)
        pq.write_table(pa.Table.from_pylist(rows[half:]), folder / "001.parquet")
    elif form == "txt":
        for i, row in enumerate(rows):
            (folder / f"{i // 1000}").mkdir(exist_ok=True)
            (folder / f"{i // 1000}" / f"{i:06d}.txt").write_bytes(row["text"].encode())
    else:
        compress = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[form]
        # Two members in one file, as after `cat a.gz b.gz`: readers that stop at the first lose half.
        packed = compress(as_jsonl(rows[:half])) + compress(as_jsonl(rows[half : half + 100]))
        (folder / f"a.{form}").write_bytes(packed)
        (folder / f"b.{form}").write_bytes(compress(as_jsonl(rows[half + 100 :])))


@pytest.mark.parametrize("form", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt"])
def test_shards_are_the_speedrun_s_byte_for_byte(rows, gpt2, tmp_path, form):
    source = tmp_path / "text"
    source.mkdir()
    (source / "README.md").write_text("not data")
    write_source(source, rows, form)
    out = tmp_path / "out"
    build(DataConfig("local", str(source), dir=str(out), tokenizer="gpt2", shard_tokens=100_000))
    expected = speedrun_files(stream([row["text"] for row in rows], gpt2), 100_000)
    assert len(expected) == 7 and written(out) == expected
    assert sorted(file.name for file in out.iterdir()) == sorted([*expected, "manifest.json"])
    assert manifest.verify_folder(out) == []


@pytest.mark.parametrize("form", ["parquet", "jsonl", "jsonl.gz", "txt"])
def test_a_source_continues_where_its_cursor_says(rows, tmp_path, form):
    source = tmp_path / "text"
    source.mkdir()
    rows = rows[:1200]
    write_source(source, rows, form)
    (source / "z.jsonl").write_bytes(b"\n" + as_jsonl(rows[:3]) + b"\n" + as_jsonl(rows[3:9]))
    whole = list(LocalText(str(source)).batches(None))
    assert [decode(raw) for batch in whole for raw, decode in batch.documents] == [
        r["text"] for r in [*rows, *rows[:9]]
    ]
    assert whole[-1].fraction == 1 and [b.fraction for b in whole] == sorted(b.fraction for b in whole)
    for at in range(len(whole)):
        rest = list(LocalText(str(source)).batches(json.loads(json.dumps(whole[at].cursor))))
        assert rest == whole[at + 1 :]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_and_single_files(rows, gpt2, local, tmp_path, workers):
    config = local(rows[:700], tokenizer="gpt2", shard_tokens=30_000, workers=workers)
    config.source += "/part.parquet"
    build(config)
    assert written(config.folder) == speedrun_files(stream([r["text"] for r in rows[:700]], gpt2), 30_000)


def test_a_document_longer_than_many_shards(local):
    config = local([{"text": "x" * 1000}, {"text": "y" * 10}], shard_tokens=64)
    build(config)
    shards = [open_shard(file).tolist() for file in [*open_split(config).val, *open_split(config).train]]
    assert sum(shards, []) == [256, *[120] * 1000, 256, *[121] * 10]
    assert [len(s) for s in shards] == [64] * 15 + [52]


def test_a_corpus_smaller_than_a_shard_gives_a_tenth_to_validation(rows, local):
    config = local(rows)
    content = build(config)
    split = open_split(config)
    tokens = np.concatenate([open_shard(file) for file in [*split.val, *split.train]])
    assert tokens.tolist() == [t for row in rows for t in [256, *row["text"].encode()]]
    assert len(open_shard(split.val[0])) == len(tokens) // 10 and content["documents"] == {"written": len(rows)}


def test_val_tokens_and_tokens_cut_exactly(rows, local):
    config = local([*rows, {"text": ""}], val_tokens=1000, tokens=5000, shard_tokens=2000)
    content = build(config)
    split = open_split(config)
    assert [len(open_shard(f)) for f in [*split.val, *split.train]] == [1000, 2000, 2000, 1000]
    everything = [t for row in rows for t in [256, *row["text"].encode()]]
    assert np.concatenate([open_shard(f) for f in [*split.val, *split.train]]).tolist() == everything[:6000]
    assert content["documents"] == {"written": everything[:6000].count(256)}, "what follows the cut is not read"
    assert content["tokens"] == {"train": 5000, "val": 1000}


def test_nothing_left_for_training_is_an_error(local, mistake):
    """And what it says can be done: nothing stays that would not go with the other setting."""
    with mistake("6 tokens", "data.val_tokens=100", "smaller data.val_tokens"):
        build(local([{"text": "short"}], val_tokens=100))
    content = build(local([{"text": "short"}], val_tokens=2))
    assert content["tokens"] == {"val": 2, "train": 4}


def test_no_text_at_all_is_an_error(local, mistake):
    config = local([{"content": "one"}, {"content": "two"}])
    with mistake(f"data.source={config.source}", "2 missing_text", "column", "`text`"):
        build(config)
    assert not config.folder.exists()


def test_bad_documents_are_counted_and_the_rest_kept(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    long_line = "word " * 2_000_000
    lines = [
        json.dumps({"text": "good"}).encode(),
        json.dumps({"text": ""}).encode(),
        b'{"text": "caf\xe9"}',
        b'{"text": "cut off',
        json.dumps({"id": "no text"}).encode(),
        json.dumps({"text": None}).encode(),
        json.dumps({"text": 7}).encode(),
        json.dumps(["text"]).encode(),
        b"",
        b"[" * 100_000,
        json.dumps({"text": long_line}).encode(),
        json.dumps({"text": "a <|endoftext|> b"}).encode(),
        json.dumps({"text": "lone \ud800 surrogate"}).encode(),
        json.dumps({"text": "last"}).encode(),
    ]
    (source / "a.jsonl").write_bytes(b"\n".join(lines))
    (source / "b.txt").write_bytes(b"\xff\xfe")
    (source / "c.txt").write_bytes(b"")
    binary = pa.array([b"fine", b"caf\xe9", None]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": binary}), source / "d.parquet")
    pq.write_table(pa.table({"content": ["x", "y"]}), source / "e.parquet")
    pq.write_table(pa.table({"text": [1, 2, 3]}), source / "f.parquet")
    config = DataConfig("local", str(source), dir=str(tmp_path / "out"), tokenizer="byte")
    content = build(config)
    kept = ["good", "", long_line, "a <|endoftext|> b", "lone \ufffd surrogate", "last", "", "fine"]
    assert content["documents"] == {
        "written": 8,
        "empty": 2,
        "invalid_utf8": 3,
        "invalid_json": 2,
        "missing_text": 10,
        "huge": 1,
        "special_text": 1,
    }
    split = open_split(config)
    tokens = np.concatenate([open_shard(file) for file in [*split.val, *split.train]])
    assert tokens.tolist() == [t for text in kept for t in [256, *text.encode()]]


def test_special_text_stays_text_under_gpt2(gpt2):
    got = encode(load_tokenizer("gpt2"), [Document(b"a <|endoftext|> b")], np.dtype("<u2"))
    assert got.tokens.tolist() == [50256, *gpt2.encode_ordinary("a <|endoftext|> b")]
    assert got.tokens.tolist().count(50256) == 1 and got.counts == {"special_text": 1}


def test_what_tiktoken_cannot_encode_is_counted():
    text = json.dumps({"text": " " * 3_000_000 + "x"}).encode()
    got = encode(load_tokenizer("gpt2"), [Document(text, decode_json), Document(b"next")], np.dtype("<u2"))
    assert got.counts == {"unencodable": 1} and len(got.starts) == 1


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("cut", [None, 50])
def test_a_damaged_source_is_named(rows, tmp_path, mistake, name, cut):
    source = tmp_path / "text"
    source.mkdir()
    if cut:
        write_source(source, rows[:200], name[2:])
        for file in source.iterdir():
            file.write_bytes(file.read_bytes()[:-cut])
    else:
        (source / name).write_bytes(b"garbage" * 50)
    with mistake(str(max(source.iterdir()) if cut is None else source), "cannot be read"):
        build(DataConfig("local", str(source), dir=str(tmp_path / "out"), tokenizer="byte"))
    assert not list((tmp_path / "out").glob("*.bin"))


def test_done_is_done_and_other_settings_need_another_folder(rows, local, mistake):
    config = local(rows[:300], shard_tokens=50_000)
    first = build(config)
    before = {file: file.stat().st_mtime_ns for file in config.folder.iterdir()}
    assert build(config) == first and before == {f: f.stat().st_mtime_ns for f in config.folder.iterdir()}
    for key, was, now in [
        ("shard_tokens", 50_000, 60_000),
        ("tokens", None, 70_000),
        ("tokenizer", "byte", "gpt2"),
        ("val_tokens", None, 100),
    ]:
        with mistake(f"data.dir={config.folder}", f"another {key} ({was}, now {now})", "choose another"):
            build(local(rows[:300], **({"shard_tokens": 50_000} | {key: now})))
    with mistake(f"data.dir={config.folder}", "another content", "choose another"):
        build(local(rows[:299], shard_tokens=50_000))
    assert before == {f: f.stat().st_mtime_ns for f in config.folder.iterdir()}


def test_foreign_shards_and_a_second_preparation_are_left_alone(rows, local, mistake):
    config = local(rows[:300])
    with folder_lock(config.folder), mistake(f"data.dir={config.folder}", "another preparation", "wait"):
        build(config)
    assert not config.folder.exists(), "an empty folder is not left behind"
    config.folder.mkdir()
    (config.folder / "fineweb_train_000001.bin").write_bytes(b"someone else's")
    with mistake(f"data.dir={config.folder}", "unknown origin", "choose another"):
        build(config)
    assert [file.name for file in config.folder.iterdir()] == ["fineweb_train_000001.bin"]


@pytest.mark.parametrize("source", ["", "shards", "/no/such/folder"])
def test_no_source_is_an_error(tmp_path, mistake, source):
    with mistake("data.source=", source, "name a folder"):
        build(DataConfig("local", source, dir=str(tmp_path / "out"), tokenizer="byte"))
    assert not list(tmp_path.iterdir())
