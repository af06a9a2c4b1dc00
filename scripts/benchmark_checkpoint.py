"""What a checkpoint costs: bytes written against bytes of tensors, and for how long training stands still.

    python scripts/benchmark_checkpoint.py model.n_layer=8 model.n_embd=512
    torchrun --nproc-per-node 2 scripts/benchmark_checkpoint.py model.n_layer=8 model.n_embd=512 optim=shampoo

The overrides are those of train.py, on top of experiment=smoke.  Synchronous and asynchronous saves of the same state
alternate, so that a change of the disk's speed meets both.  Synchronous: until the checkpoint is committed, hashes and
fsync included.  Asynchronous: until training may go on.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarks.options import count  # noqa: E402
from trainer.config import world_size  # noqa: E402
from trainer.launch import load_config  # noqa: E402
from trainer.loop import Trainer  # noqa: E402
from trainer.metrics.environment import describe  # noqa: E402
from trainer.parallel import teardown  # noqa: E402
from trainer.run import storage  # noqa: E402
from trainer.run.dcp_index import read_index  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py")
    parser.add_argument("--repeat", type=count, default=5, help="saves of each kind (default: 5)")
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:  # rank 0's is used
        trainer = build([*options.overrides, "logger=jsonl"], folder)
        pauses = measure(trainer, options.repeat)
        if trainer.parallel.is_main:
            report(trainer, pauses)
        trainer.parallel.barrier()
    trainer.checkpoints.close()
    del trainer  # it holds the groups
    teardown()


def build(overrides: list[str], folder: str) -> Trainer:
    """A Trainer after its first update, so that all optimizer state exists."""
    config = load_config(["experiment=smoke", *overrides], world_size())
    config.run.dir = f"{folder}/run"
    trainer = Trainer(config)
    trainer.checkpoints.before_commit = lambda: None  # there is no record
    trainer.train_step(0)
    return trainer


def measure(trainer: Trainer, repeat: int) -> dict[str, list[float]]:
    """Seconds of every save by kind.  The first asynchronous one, which allocates the copies, is not counted."""
    pauses: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
    for number in range(2 * repeat + 2):
        kind = "synchronous" if number % 2 else "asynchronous"
        trainer.progress.step = number + 1
        trainer.parallel.barrier()
        start = time.perf_counter()
        trainer.checkpoints.save(trainer.progress)
        if kind == "synchronous":
            trainer.checkpoints.wait()
        seconds = time.perf_counter() - start
        if fault := trainer.checkpoints.poll(wait=True):
            raise SystemExit(f"error: {fault}")
        if number > 1:
            pauses[kind].append(seconds)
    return pauses


def report(trainer: Trainer, pauses: dict[str, list[float]]) -> None:
    folder = storage.committed(trainer.checkpoints.folder)[0]
    written = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{describe(trainer.parallel)}, {trainer.config.optim.name}")
    print(
        f"tensors {tensor_bytes(folder):,} bytes; written {written:,} bytes: {written / tensor_bytes(folder):.4f} times"
    )
    medians = {kind: statistics.median(seconds) for kind, seconds in pauses.items()}
    for kind, seconds in pauses.items():
        print(f"{kind:12} {1e3 * medians[kind]:8.1f} ms  ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})")
    ratio = medians["asynchronous"] / medians["synchronous"]
    print(f"asynchronous saving pauses training for {100 * ratio:.1f}% of a synchronous save")


def tensor_bytes(folder: Path) -> int:
    """Of all tensors of a checkpoint, each once."""
    entries = read_index(folder).state_dict_metadata.values()
    return sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in entries)


if __name__ == "__main__":
    main()
