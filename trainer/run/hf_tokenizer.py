"""Our tokenizers as transformers' fast ones: the same tokens, after the one that begins a document."""

from typing import TYPE_CHECKING

from data.tokenizer import ByteTokenizer, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"


def fast_tokenizer(tokenizer: Tokenizer, seq_len: int) -> "PreTrainedTokenizerFast":
    """Raises ValueError: the encoding has more special tokens than the end of the text."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, ByteTokenizer):
        ranks, pattern = {bytes([byte]): byte for byte in range(256)}, None
    else:
        ranks, pattern = tokenizer.encoding._mergeable_ranks, tokenizer.encoding._pat_str
        if len(ranks) != tokenizer.eos or tokenizer.vocab_size != tokenizer.eos + 1:
            raise ValueError(f"data.tokenizer={tokenizer.name}: special tokens other than {EOS} have no form here")
    letters = byte_letters()
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    pairs = [("".join(letters[b] for b in left), "".join(letters[b] for b in right)) for left, right in merges(ranks)]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    steps = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")] if pattern else []
    fast.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([EOS])
    assert fast.token_to_id(EOS) == tokenizer.eos
    fast.post_processor = processors.TemplateProcessing(f"{EOS} $A", special_tokens=[(EOS, tokenizer.eos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token=EOS, eos_token=EOS, pad_token=EOS, model_max_length=seq_len,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def byte_letters() -> list[str]:
    """The printable character that GPT-2's vocabulary writes for each byte (Radford et al. 2019, encoder.py)."""
    plain = [b for b in range(256) if chr(b).isprintable() and b != 32]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in range(256)]


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs whose merging made each token, in order: what is left of it by the merges of lower rank."""
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            at = joined.index(min(joined))
            if joined[at] == rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found
