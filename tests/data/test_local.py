"""Every file of a folder of text is read, or counted with the reason why not, or named where it is damaged."""

import codecs
import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common import UserError
from data.build import build
from data.config import DataConfig
from data.shards import open_shard
from data.sources.local import LocalText
from data.split import open_split
from data.tokenizer import load_tokenizer

FILLER = "filler " * 9  # a document beside the one in question
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def text(tmp_path):
    """tmp_path/text, a folder with one document."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(FILLER)
    return tmp_path / "text"


def gzipped(text):
    return gzip.compress(text, mtime=0)  # the time would be in the test's name


def line(text: str) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def prepared(source) -> tuple[list[str], dict[str, int]]:
    """All documents, and what the manifest counts."""
    config = DataConfig("local", str(source), dir=f"{source}-out", tokenizer="byte")
    counts = build(config)["documents"]
    split = open_split(config)
    tokens = np.concatenate([open_shard(file) for file in (*split.val, *split.train)]).tolist()
    return load_tokenizer("byte").decode(tokens).split("<|endoftext|>")[1:], counts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.JSONL", line("one")),
        ("b.TXT", b"one"),
        ("b.ndjson", line("one")),
        ("b.NDJSON.GZ", gzipped(line("one"))),
        ("b.Jsonl.Gz", gzipped(line("one"))),
        ("b.with.dots.txt", b"one"),
        ("b.jsonl", codecs.BOM_UTF8 + line("one")),
        ("b.jsonl.gz", gzipped(codecs.BOM_UTF8 + line("one"))),
        ("b.txt", codecs.BOM_UTF8 + b"one"),
        ("sub.txt/deep/er/b.jsonl", line("one")),
        ("b.jsonl", line("one").rstrip()),
        ("b.jsonl", line("one").replace(b"\n", b"\r\n")),
    ],
)
def test_what_is_text_is_read(text, name, content):
    (text / name).parent.mkdir(parents=True, exist_ok=True)
    (text / name).write_bytes(content)
    assert prepared(text) == ([FILLER, "one"], {"written": 2})


def test_marks_between_joined_files_are_no_text(text):
    (text / "b.jsonl").write_bytes(b"".join(codecs.BOM_UTF8 + line(word) for word in ("one", "two")))
    assert prepared(text) == ([FILLER, "one", "two"], {"written": 3})


def column(kind: str) -> pa.Array:
    words = pa.array(["one", "two", "one"])
    if kind.startswith("dictionary"):
        return words.cast(kind.partition(" ")[2]).dictionary_encode()
    return words.cast(getattr(pa, kind)()) if kind != "fixed" else words.cast(pa.binary()).cast(pa.binary(3))


@pytest.mark.parametrize(
    "kind",
    ["string", "large_string", "string_view", "binary", "large_binary", "fixed"]
    + ["dictionary string", "dictionary binary", "dictionary large_string"],
)
def test_any_column_of_characters_or_bytes_is_text(text, kind):
    pq.write_table(pa.table({"text": column(kind), "id": [1, 2, 3]}), text / "b.PARQUET", row_group_size=2)
    assert prepared(text) == ([FILLER, "one", "two", "one"], {"written": 4})


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        (".ipynb_checkpoints/b.txt", b"one", "hidden"),
        (".b.txt", b"one", "hidden"),
        ("__MACOSX/._b.txt", b"one", "hidden"),
        ("b.csv", b"one", "unread .csv"),
        ("b.json", b"one", "unread .json"),
        ("b.txt.gz", gzipped(b"one"), "unread .txt.gz"),
        ("b.txt~", b"one", "unread .txt~"),
        ("README", b"one", "unread README"),
        ("b.jsonl", b"", "empty_file"),
        ("b.txt", "one".encode("utf-16"), "invalid_utf8"),
        ("b.txt", "one".encode("utf-16-le"), "nul_bytes"),
        ("b.txt", "café".encode("latin-1"), "invalid_utf8"),
        ("b.jsonl", '{"text": "café"}'.encode("latin-1"), "invalid_utf8"),
        ("b.jsonl", b'{"text": {"text": "one"}}', "missing_text"),
        ("b.jsonl", b'{\n"text": "one"}', "invalid_json"),
    ],
)
def test_what_is_not_read_is_counted(text, name, content, kind):
    (text / name).parent.mkdir(parents=True, exist_ok=True)
    (text / name).write_bytes(content)
    documents, counts = prepared(text)
    assert documents == [FILLER] and counts == {"written": 1, kind: 1 + (kind == "invalid_json")}


def test_linked_folders_and_files_are_read_once(text, tmp_path):
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "deep" / "x.txt").write_text("far")
    (tmp_path / "y.txt").write_text("file")
    (text / "sub").mkdir()
    (text / "b").symlink_to(tmp_path / "far")  # from elsewhere
    (text / "c.txt").symlink_to(tmp_path / "y.txt")
    (text / "sub" / "again").symlink_to(tmp_path / "far" / "deep")  # a second way to what has been read
    (text / "sub" / "d.txt").symlink_to("../a.txt")
    (text / "sub" / "gone.txt").symlink_to("nowhere")
    os.link(text / "a.txt", text / "sub" / "hard.txt")
    assert prepared(text) == ([FILLER, "far", "file"], {"written": 3, "linked_again": 3, "broken_link": 1})


def test_circles_of_links_end(text, tmp_path):
    (text / "self").symlink_to(".")
    (text / "p").symlink_to("q")
    (text / "q").symlink_to("p")
    (text / "r").mkdir()
    (text / "r" / "back").symlink_to(text)
    (text / "r" / "up").symlink_to("..")
    assert prepared(text) == ([FILLER], {"written": 1, "linked_again": 3, "broken_link": 2})


def test_a_hidden_root_and_a_linked_root_are_read(text, tmp_path, mistake):
    text.rename(tmp_path / ".hidden")
    (tmp_path / "link").symlink_to(".hidden")
    (tmp_path / "circle").symlink_to("circle")
    with mistake("data.source=", "circle", "does not exist", "name a folder"):
        LocalText(str(tmp_path / "circle"))
    for source in (".hidden", "link", ".hidden/a.txt"):
        assert [file.name for file in LocalText(str(tmp_path / source)).files] == ["a.txt"]


def test_a_pipe_is_not_waited_for(text):
    os.mkfifo(text / "b.txt")
    assert prepared(text) == ([FILLER], {"written": 1, "unread .txt": 1})


def test_a_folder_that_cannot_be_listed_is_named(text, monkeypatch, mistake):
    (text / "sub").mkdir()
    real = type(text).iterdir

    def listed(folder):
        if folder.name == "sub":
            raise PermissionError(13, os.strerror(13), str(folder))
        return real(folder)

    monkeypatch.setattr(type(text), "iterdir", listed)
    with mistake(f"data.source={text}", str(text / "sub"), "Permission denied"):
        LocalText(str(text))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("b.jsonl.gz", b"", ["0 bytes", "gzip"]),
        ("b.jsonl.zst", b"", ["0 bytes", "zstd"]),
        ("b.parquet", b"", ["cannot be read"]),
        ("b.jsonl", LFS, ["Git LFS pointer", "git lfs pull"]),
        ("b.jsonl.gz", LFS, ["Git LFS pointer"]),
        ("b.parquet", LFS, ["Git LFS pointer"]),
        ("b.txt", LFS, ["Git LFS pointer"]),
        ("b.jsonl", json.dumps([{"text": "one"}]).encode(), ["JSON array", "jq"]),
        ("b.jsonl", json.dumps([{"text": "one"}], indent=1).encode(), ["JSON array"]),
        ("b.jsonl.gz", gzipped(b'\xef\xbb\xbf\n [{"text": "one"}]'), ["JSON array"]),
        ("b.jsonl", line("one").decode().encode("utf-16"), ["UTF-16", "UTF-8"]),
        ("b.jsonl", line("one").decode().encode("utf-16-be"), ["UTF-16"]),
        ("b.ndjson", line("one").decode().encode("utf-32"), ["UTF-32"]),
        ("b.jsonl", gzipped(line("one")), ["compressed", ".jsonl.gz"]),
        ("b.ndjson", pa.compress(line("one"), "zstd", asbytes=True), ["compressed", ".jsonl.zst"]),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_named(text, mistake, name, content, reason):
    (text / name).write_bytes(content)
    with mistake(str(text / name), *reason):
        prepared(text)


def test_two_columns_of_one_name_are_named(text, mistake):
    table = pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    pq.write_table(table, text / "b.parquet")
    with mistake(str(text / "b.parquet"), "2 columns", "`text`"):
        prepared(text)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("b.jsonl", '{"text": "café"}'.encode("latin-1"), ["1 invalid_utf8", "iconv"]),
        ("b.txt", "one".encode("utf-16"), ["1 invalid_utf8", "UTF-8"]),
        ("b.txt", "one".encode("utf-16-le"), ["1 nul_bytes", "UTF-16"]),
        ("b.jsonl", b"one\ntwo\n", ["2 invalid_json", "one JSON object"]),
        ("b.jsonl", b'{"content": "one"}', ["1 missing_text", "column `text`"]),
        ("b.jsonl", b"\n", ["no row at all"]),
    ],
)
def test_the_reason_for_no_text_is_the_true_one(text, mistake, name, content, reason):
    (text / "a.txt").unlink()
    (text / name).write_bytes(content)
    with mistake(f"data.source={text}", *reason):
        prepared(text)
    with pytest.raises(UserError) as caught:
        prepared(text)
    assert ("column" in str(caught.value)) == ("1 missing_text" in reason)


@pytest.mark.parametrize(("name", "found"), [("b.csv", "1 unread .csv"), (".b.txt", "1 hidden"), (None, "nothing")])
def test_a_folder_without_text_says_what_it_holds(text, mistake, name, found):
    (text / "a.txt").unlink()
    if name:
        (text / name).write_text("one")
    with mistake(f"data.source={text}", found, "name a folder"):
        LocalText(str(text))
