"""Text with and without a cache of keys and values: tokens a second, and the largest difference of log-probabilities.

    python scripts/benchmark_sample.py [--layers 6 --width 384 --heads 6 --vocabulary 257 --tokens 256 --texts 1]

Random weights, float32, on this machine's CPU, in processor time; with and without take turns. Beside each is its
floor: its floating-point operations at the speed of a product over 256 tokens, or one read of weights, keys and
values at the speed at which memory is read, whichever takes longer.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarks.options import count  # noqa: E402
from trainer.evaluate.generate import Sampling, generate  # noqa: E402
from trainer.model import GPT, GPTConfig  # noqa: E402
from trainer.parallel import initialise  # noqa: E402

COUNT = {True: 32, False: 4}  # tokens that are timed, with a cache and without


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(layers=6, width=384, heads=6, vocabulary=257, tokens=256, texts=1, rounds=5).items():
        parser.add_argument(f"--{name}", type=count, default=default)
    options = parser.parse_args()
    config = GPTConfig(n_layer=options.layers, n_head=options.heads, n_embd=options.width)
    model = GPT(config, vocab_size=options.vocabulary, seq_len=options.tokens + 33).eval()
    initialise(model, seed=0)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {torch.get_num_threads()} threads")
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(options.vocabulary, (options.texts, options.tokens), generator=generator)
    compare(model, text, options.rounds)
    with torch.no_grad():
        cache = model.new_cache(options.tokens)
        single = torch.cat([model(text[:, i : i + 1], cache=cache) for i in range(options.tokens)], 1)
        apart = (single.log_softmax(-1) - model(text).log_softmax(-1)).abs().max()
    print(f"log-probabilities are at most {apart:.1e} apart")


def compare(model: GPT, text: torch.Tensor, rounds: int) -> None:
    """Print milliseconds a token of one text, and how many times as fast it is with the cache."""
    texts, length = text.shape
    pairs = [(seconds(model, text, cached=True), seconds(model, text, cached=False)) for _ in range(rounds)]
    rows = zip(("with a cache", "without"), zip(*pairs, strict=True), floors(model, texts, length), strict=True)
    for name, taken, floor in rows:
        ms, least = (1e3 / texts * value for value in (statistics.median(taken), floor))
        print(f"after {length} tokens, {name}: {ms:.1f} ms a token, {ms / least:.1f} times its floor of {least:.1f} ms")
    ratios = sorted(without / with_cache for with_cache, without in pairs)
    print(f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f}) times as fast with a cache")


def seconds(model: GPT, text: torch.Tensor, cached: bool) -> float:
    """Of processor time for a next token of every text, once the texts have been read."""
    drawn = generate(model, text, COUNT[cached] + 1, Sampling(), cached=cached)
    next(drawn)
    start = time.process_time()
    count = sum(1 for _ in drawn)
    return (time.process_time() - start) / count


def floors(model: GPT, texts: int, length: int) -> tuple[float, float]:
    """Least seconds of one more token of every text, each of so many tokens: with a cache, and without."""
    config = model.config
    width, layers = config.n_embd, config.n_layer
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    head, (flops, nbytes) = model.padded_vocab * width, speeds()
    scores = 4 * layers * width * length  # of one query: with the keys, and of the weights with the values
    with_cache = texts * 2 * (matrices + head) + texts * scores
    without = texts * length * (2 * matrices + scores / 2) + texts * 2 * head
    weights, kept = 4 * (matrices + head), 4 * texts * 2 * layers * width * length
    return max(with_cache / flops, (weights + kept) / nbytes), max(without / flops, weights / nbytes)


def speeds() -> tuple[float, float]:
    """FLOP/s of a product over 256 tokens, and bytes/s of a read of memory: the best of five."""
    x, w, long = torch.randn(256, 768), torch.randn(768, 3072), torch.randn(2**25)
    return 2 * x.shape[0] * w.numel() / best(partial(torch.mm, x, w)), long.nbytes / best(long.sum)


def best(function: Callable[[], object]) -> float:
    function()
    taken = []
    for _ in range(5):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return min(taken)


if __name__ == "__main__":
    main()
