"""Random folders of text: every document of a sound file comes out once, every other file is counted or named.

``make soak`` draws a thousand folders.
"""

import codecs
import gzip
import json
import os
from collections import Counter
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import UserError
from data.documents import BadDocument
from data.sources.local import LocalText

EXAMPLES = 1000 if "NANOMUON_SOAK" in os.environ else 60
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
DOCUMENTS = st.lists(TEXTS, min_size=1, max_size=4)
NAMES = st.sampled_from(["a", "b.c", "train", "Ä", "x y", ".hidden", "sub/a", "sub/.hid/b", "deep/er/c"])


def json_lines(texts):
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def parquet(texts, column="text", cast=None):
    array = pa.array(texts)
    array = array.dictionary_encode() if cast == "dictionary" else array.cast(cast) if cast else array
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: array}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


# kind -> (endings, bytes of a file of these documents, what comes out: "all", "bad" documents, or "named" as an error)
SOUND = {
    "jsonl": ([".jsonl", ".JSONL", ".ndjson"], json_lines),
    "jsonl with a mark": ([".jsonl"], lambda texts: codecs.BOM_UTF8 + json_lines(texts)),
    "jsonl with blank lines and no last newline": ([".jsonl"], lambda t: b"\n \n" + json_lines(t).rstrip(b"\n")),
    "gzip": ([".jsonl.gz", ".ndjson.GZ"], lambda texts: gzip.compress(json_lines(texts))),
    "gzip, two members": ([".jsonl.gz"], lambda t: gzip.compress(json_lines(t[:1])) + gzip.compress(json_lines(t[1:]))),
    "parquet": ([".parquet", ".PARQUET"], parquet),
    "parquet, dictionary": ([".parquet"], lambda texts: parquet(texts, cast="dictionary")),
    "parquet, binary": ([".parquet"], lambda texts: parquet(texts, cast=pa.large_binary())),
}
BAD = {  # documents that are counted by their kind
    "latin-1 lines": ([".jsonl"], lambda t: b"".join(b'{"text": "\xe9"}\n' for _ in t), "invalid_utf8"),
    "lines of other JSON": ([".jsonl"], lambda t: b"".join(b'{"txt": 1}\n' for _ in t), "missing_text"),
    "numbers for text": ([".jsonl"], lambda t: b"".join(b'{"text": 1}\n' for _ in t), "missing_text"),
    "broken lines": ([".jsonl"], lambda t: b'{"text": "x\n' * len(t), "invalid_json"),
    "deep lines": ([".jsonl"], lambda t: (b"[" * 9000 + b"\n").replace(b"[", b'{"a":', 1) * len(t), "invalid_json"),
    "column of another name": ([".parquet"], lambda t: parquet(t, "content"), "missing_text"),
    "nulls": ([".parquet"], lambda t: parquet([None] * len(t), cast=pa.string()), "missing_text"),
}
NAMED = {  # files that stop the preparation
    "cut gzip": ([".jsonl.gz"], lambda t: gzip.compress(json_lines(t) * 50)[:-9]),
    "empty gzip": ([".jsonl.gz"], lambda t: b""),
    "plain lines called gzip": ([".jsonl.gz"], json_lines),
    "cut parquet": ([".parquet"], lambda t: parquet(t)[:-5]),
    "lines called parquet": ([".parquet"], json_lines),
    "LFS pointer": ([".parquet", ".jsonl", ".txt"], lambda t: b"version https://git-lfs.github.com/spec/v1\noid 0\n"),
    "UTF-16 lines": ([".jsonl"], lambda t: json_lines(t).decode().encode("utf-16")),
    "a JSON array": ([".jsonl"], lambda t: json.dumps([{"text": x} for x in t]).encode()),
}
UNREAD = {"csv": ([".csv", ".md", ".json", ".arrow", ""], json_lines), "empty lines": ([".jsonl"], lambda t: b"")}
TEXT = {
    "text": ([".txt", ".TXT"], lambda texts: texts[0].encode()),
    "text with a mark": ([".txt"], lambda texts: codecs.BOM_UTF8 + texts[0].encode()),
}
ALL = SOUND | {k: v[:2] for k, v in BAD.items()} | NAMED | UNREAD | TEXT


@st.composite
def files(draw):
    chosen = {}
    for number in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from([*SOUND, *SOUND, *TEXT, *TEXT, *BAD, *UNREAD, *([] if number else NAMED)]))
        endings, _ = ALL[kind]
        name = f"{draw(NAMES)}{number}{draw(st.sampled_from(endings))}"
        chosen[name] = kind, draw(DOCUMENTS)
    return chosen


def hidden(name):
    return any(part.startswith(".") for part in name.split("/"))


@pytest.mark.slow
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(files(), st.booleans(), st.integers(0, 20))
def test_every_document_comes_once_or_its_file_is_named(tmp_path_factory, chosen, linked, skip):
    root = tmp_path_factory.mktemp("text")
    expected, stops, readable = Counter(), [], False
    for name, (kind, texts) in chosen.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ALL[kind][1](texts))
        if hidden(name) or kind in UNREAD:
            continue
        readable = True
        if kind in NAMED:
            stops.append(path.name)
        elif kind in TEXT:
            expected[texts[0] if "mark" in kind else texts[0].removeprefix("\ufeff")] += 1
        elif kind in BAD:
            expected[("bad", BAD[kind][2])] += len(texts)
        else:
            expected.update(texts)
    if linked:  # the same text by another way: once all the same
        (root / "link").symlink_to(root / "sub")
        (root / "again").symlink_to(root)

    def read(cursor=None):
        with patch("data.documents.BATCH_DOCUMENTS", 2):
            for batch in LocalText(str(root)).batches(cursor):
                yield batch, [decoded(document) for document in batch.documents]

    try:
        batches = list(read())
    except UserError as error:
        message = str(error)
        assert "\n" not in message and (any(name in message for name in stops) or not readable), message
        return
    assert readable and not stops
    found = Counter(text for _, texts in batches for text in texts)
    assert found == expected
    cursor = json.loads(json.dumps(batches[min(skip, len(batches) - 1)][0].cursor))
    rest = [texts for _, texts in batches[min(skip, len(batches) - 1) + 1 :]]
    assert [texts for _, texts in read(cursor)] == rest


def decoded(document):
    try:
        return document.decode(document.raw)
    except BadDocument as bad:
        return "bad", str(bad)
