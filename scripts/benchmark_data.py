"""How fast the data path is: preparation, loader, opening, memory. Prints the figures of docs/data.md.

    python scripts/benchmark_data.py [DIR]     # DIR: where some 300 MB may be written; default: the temporary folder

Each line ends with the requirement and whether it was met. Rates that are compared are measured alternately, so
that other work on the machine disturbs both; each is the best of its rounds.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.build import build, prepare  # noqa: E402
from data.config import DataConfig  # noqa: E402
from data.loader import Loader  # noqa: E402
from data.shards import header, open_shard, write_shard  # noqa: E402
from data.sources.sample import SampleText  # noqa: E402
from data.split import open_split  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from trainer.model import GPT, GPTConfig  # noqa: E402

ROUNDS = 5
STEPS = 20
CORES = len(os.sched_getaffinity(0))
SHARD = 50_000_000  # tokens, real data on disk
UINT16 = np.dtype("<u2")


def seconds(work: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def print_result(text: str, met: bool) -> None:
    print(f"{text}: {'met' if met else 'NOT MET'}", flush=True)


def preparation(folder: Path) -> None:
    """`build` from parquet to shards against tiktoken alone on the same texts, already in memory."""
    paragraphs = [paragraph for text in SampleText().texts for paragraph in text.split("\n")]
    texts = ["\n".join(paragraphs[i : i + 10]) for i in range(0, len(paragraphs), 10)] * 6  # ≈ 740 tokens each
    (folder / "text").mkdir()
    pq.write_table(pa.table({"text": texts}), folder / "text" / "a.parquet", row_group_size=1000)
    encoding = load_tokenizer("gpt2").encoding
    tokens = sum(map(len, encoding.encode_ordinary_batch(texts))) + len(texts)
    best = {"build": float("inf"), "bare": float("inf")}
    for round_ in range(ROUNDS):
        config = DataConfig("local", str(folder / "text"), dir=str(folder / f"out{round_}"), tokenizer="gpt2")
        best["build"] = min(best["build"], seconds(lambda config=config: build(config)))
        bare = seconds(lambda: encoding.encode_ordinary_batch(texts, num_threads=CORES))
        best["bare"] = min(best["bare"], bare)
    rate = {name: tokens / least / 1e6 for name, least in best.items()}
    ratio = rate["build"] / rate["bare"]
    print_result(
        f"preparation: {rate['build']:.2f}M tokens/s, bare encode_ordinary_batch {rate['bare']:.2f}M tokens/s, "
        f"ratio {ratio:.2f} (at least 0.85)",
        ratio >= 0.85,
    )


def read(loader: Loader, first: int) -> None:
    for step in range(first, first + STEPS):
        loader.batch(step)


def throughput(folder: Path) -> None:
    """The loader alone, from real shards, batches of 512 x 1024 with the vocabulary checked."""
    rng = np.random.default_rng(0)
    for i in range(3):
        write_shard(folder / f"{i}.bin", rng.integers(50257, size=SHARD, dtype=np.uint16))
    for order in ("sequential", "shuffled"):
        loader = Loader(
            sorted(folder.glob("*.bin")),
            seq_len=1024,
            batch_sequences=512,
            micro_batch=64,
            order=order,
            vocab_size=50257,
        )
        cpu = time.process_time()
        best = min(seconds(partial(read, loader, first)) for first in range(0, ROUNDS * STEPS, STEPS))
        cpu = (time.process_time() - cpu) / ROUNDS
        loader.close()
        rate, cpu_rate = (STEPS * 512 * 1024 / each / 1e6 for each in (best, cpu))
        print_result(
            f"loader, {order}: {rate:.0f}M tokens/s (at least 50M), {cpu_rate:.0f}M for each second of processor time",
            rate >= 50,
        )


def share_of_a_step(folder: Path) -> None:
    """What `batch` costs the loop, beside forward and backward of experiment=smoke's model."""
    smoke = OmegaConf.load(ROOT / "configs/experiment/smoke.yaml").train
    sizes = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/model/tiny.yaml"))
    config = DataConfig("sample", "sample", dir=str(folder / "sample"), tokenizer="byte")
    prepare(config)
    split = open_split(config)
    model = GPT(GPTConfig(**sizes), split.vocab_size, smoke.seq_len)
    loader = Loader(
        split.train,
        seq_len=smoke.seq_len,
        batch_sequences=smoke.batch_tokens // smoke.seq_len,
        order="shuffled",
        vocab_size=split.vocab_size,
    )
    loading, stepping = [], []
    for step in range(20):
        batch: list = []
        loading.append(seconds(lambda step=step, batch=batch: batch.extend(loader.batch(step))))
        stepping.append(seconds(lambda batch=batch: [model(*pair).backward() for pair in batch]))
    reading = [seconds(lambda step=step: loader._read(step)) for step in range(20)]
    loader.close()
    wait, step, read = (1e3 * float(np.median(each)) for each in (loading, stepping, reading))
    print_result(
        f"loader in a smoke step: {wait:.2f} ms of {step:.0f} ms, {100 * wait / step:.2f}% (below 1%); "
        f"without reading ahead it would wait {read:.2f} ms",
        wait < 0.01 * step,
    )


def pinned_memory() -> None:
    """Copies to the device from pinned against pageable memory: a batch of 512 x 1024 int64."""
    if not torch.cuda.is_available():
        print("pinned memory: no CUDA device here, not measured")
        return
    pageable = torch.zeros(512, 1024, dtype=torch.int64)
    rates = []
    for source in (pageable, pageable.pin_memory()):

        def copy(source=source) -> None:
            for _ in range(50):
                source.to("cuda", non_blocking=True)
            torch.cuda.synchronize()

        copy()
        rates.append(50 * source.nbytes / seconds(copy) / 1e9)
    print(f"copies to the device: {rates[0]:.1f} GB/s pageable, {rates[1]:.1f} GB/s pinned")


def hundred_shards(folder: Path) -> None:
    """10B tokens in 100 sparse files: the time to open them, and the memory of the shuffled order."""
    for i in range(100):
        with open(folder / f"{i:03d}.bin", "wb") as file:
            file.write(header(10**8, UINT16))
            file.truncate(1024 + 2 * 10**8)
    files = sorted(folder.glob("*.bin"))
    took = seconds(lambda: [open_shard(file) for file in files])
    print_result(f"opening 100 shards: {1e3 * took:.1f} ms (below 1 s)", took < 1)
    gc.collect()
    before, used = anonymous_memory(), 0
    loader = Loader(files, seq_len=1024, batch_sequences=512, order="shuffled")
    for step in range(200):
        windows = loader.windows(step * 97)
        used = max(used, anonymous_memory() - before)
    del windows
    loader.close()
    print_result(f"shuffled order over 10B tokens: {used / 1e6:.1f} MB (below 50 MB)", used < 50e6)


def anonymous_memory() -> int:
    """Bytes of this process's own memory, mapped files left out (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main() -> None:
    print(f"{CORES} cores, load {os.getloadavg()[0]:.1f} before the start")
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    for measure in (preparation, throughput, share_of_a_step, hundred_shards):
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            measure(Path(folder))
    pinned_memory()


if __name__ == "__main__":
    main()
