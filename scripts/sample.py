"""Text from a trained run.

    python scripts/sample.py runs/mine --prompt "The country"          one text, as it is drawn
    python scripts/sample.py runs/mine --samples 5 --temperature 0.5   five, side by side
    python scripts/sample.py runs/mine                                 prompts are asked for, one a line
    python scripts/sample.py runs/mine@400 …                           as it was after update 400

From a checkpoint of any ranks and sharding; on a GPU where there is one. A prompt begins a document. The same seed
gives the same text.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError  # noqa: E402
from trainer.evaluate.generate import Sampling, complete, encode_prompt, generate, printable  # noqa: E402
from trainer.run.weights import Trained, find_checkpoint, load_trained, usable_device  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        if min(options.tokens, options.samples) < 1:
            raise UserError(f"--tokens {options.tokens} --samples {options.samples}: give at least 1 of each")
        if not 0 <= options.seed < 2**63:
            raise UserError(f"--seed {options.seed}: give a number from 0 to {2**63 - 1}")
        folder, faults = find_checkpoint(options.run)
        for fault in faults:
            print(f"warning: {fault}", file=sys.stderr)
        trained = load_trained(folder, usable_device(options.device), options.trust_code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {trained.settings['model.name']} after update {trained.step}, {options.device}", file=sys.stderr)
    try:
        for prompt in prompts(options.prompt):
            sample(trained, prompt, sampling, options)
    except KeyboardInterrupt:
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's directory, RUN@STEP, or one of its checkpoints")
    parser.add_argument("--prompt", action="append", help="what the text begins with; may be given several times")
    parser.add_argument("--samples", type=int, default=1, help="texts for each prompt (default: 1)")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many tokens in each (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest that together have this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--trust-code", action="store_true", help="import the run's model class, if it is not of ours")
    return parser.parse_args(arguments)


def prompts(given: Sequence[str] | None) -> Iterator[str]:
    """Those of the command line, or one a line until the input ends."""
    if given is not None:
        yield from given
        return
    asking = sys.stdin.isatty()
    if asking:
        print("a prompt, then Enter; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            yield input("> " if asking else "")
        except EOFError:
            return


def sample(trained: Trained, prompt: str, sampling: Sampling, options: argparse.Namespace) -> None:
    start = time.perf_counter()
    if options.samples == 1:
        count = stream(trained, prompt, sampling, options)
    else:
        texts = complete(
            trained.model, trained.tokenizer, prompt, options.tokens, sampling, options.seed, options.samples
        )
        print("\n---\n".join(map(printable, texts)))
        count = options.samples * options.tokens
    print(f"({count / (time.perf_counter() - start):,.0f} tokens/s)", file=sys.stderr)


def stream(trained: Trained, prompt: str, sampling: Sampling, options: argparse.Namespace) -> int:
    """Print a text while it is drawn, each character when all of its bytes are there; returns how many tokens."""
    model, tokenizer = trained.model, trained.tokenizer
    place = next(model.parameters()).device
    tokens = torch.tensor([encode_prompt(tokenizer, prompt)], device=place)
    print(printable(prompt), end="", flush=True)
    drawn, shown = list[int](), ""
    for token in generate(model, tokens, options.tokens, sampling, options.seed, stop=tokenizer.eos):
        if token.item() == tokenizer.eos:
            break
        drawn.append(int(token))
        whole = tokenizer.decode(drawn).rstrip("\ufffd")
        print(printable(whole[len(shown) :]), end="", flush=True)
        shown = whole if len(whole) > len(shown) else shown
    print(printable(tokenizer.decode(drawn)[len(shown) :]))
    return len(drawn)


if __name__ == "__main__":
    sys.exit(main())
