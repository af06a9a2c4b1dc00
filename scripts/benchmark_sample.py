"""Text with and without a cache of keys and values: tokens a second, and the largest difference of log-probabilities.

    python scripts/benchmark_sample.py [--layers 6 --width 384 --tokens 256]

Random weights, one text, float32, on this machine's CPU; medians of three rounds each.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.evaluate.generate import Sampling, generate  # noqa: E402
from trainer.model import GPT, GPTConfig  # noqa: E402
from trainer.parallel import initialise  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = GPTConfig(n_layer=options.layers, n_head=6, n_embd=options.width)
    model = GPT(config, vocab_size=257, seq_len=options.tokens + 32).eval()
    initialise(model, seed=0)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {torch.get_num_threads()} threads")
    text = torch.randint(257, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    for what, prompt, count in (("the first", text[:, :1], options.tokens), ("after as many", text, 32)):
        with_cache, without = (speed(model, prompt, count, cached, options.rounds) for cached in (True, False))
        print(f"{what} {options.tokens} tokens: {with_cache:,.0f} tokens/s with a cache, {without:,.0f} without: "
              f"{with_cache / without:.1f} times")  # fmt: skip
    with torch.no_grad():
        cache = model.new_cache(options.tokens)
        single = torch.cat([model(text[:, i : i + 1], cache=cache) for i in range(options.tokens)], 1)
        apart = (single.log_softmax(-1) - model(text).log_softmax(-1)).abs().max()
    print(f"log-probabilities are at most {apart:.1e} apart")


def speed(model: GPT, prompt: torch.Tensor, count: int, cached: bool, rounds: int) -> float:
    """Tokens a second of processor time; the prompt's own pass counts too."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        list(generate(model, prompt, count, Sampling(), cached=cached))
        seconds.append(time.process_time() - start)
    return count / statistics.median(seconds)


if __name__ == "__main__":
    main()
