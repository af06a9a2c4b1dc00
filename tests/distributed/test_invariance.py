"""World-size invariance: the same losses on any number of processes under any sharding, for the whole program."""

import functools
import os
from pathlib import Path

import pytest

from tests.distributed import hooks
from tests.distributed.harness import run_workers
from tests.runs import TINY, read_losses, read_record, train
from trainer.launch import load_config
from trainer.loop import Trainer
from trainer.parallel import teardown

pytestmark = pytest.mark.slow
SMALL = [
    "experiment=smoke", "logger=jsonl", "model.n_layer=2", "model.n_embd=48", "train.seq_len=32",
    "train.batch_tokens=768", "train.micro_batch=2", "train.clip=1.0",
]  # fmt: skip
STEPS = 60 if "NANOMUON_SOAK" in os.environ else 24
LONG = [*SMALL, f"train.steps={STEPS}", "eval.every=8", "eval.tokens=1600"]
KINDS = {f"{optim}-{dtype}": [*LONG, f"optim={optim}", f"train.dtype={dtype}"]
         for optim in ("adamw", "muon") for dtype in ("float32", "float64")}  # fmt: skip
SWEPT = list(KINDS)
KINDS["own"] = [*SMALL, "model=custom", "model._target_=examples.grouped_query_gpt.GroupedQueryGPT", "train.steps=8",
                "eval.every=4", "eval.tokens=768", "train.dtype=float64"]  # fmt: skip
FREE = [*TINY, "optim=muon", "optim.matrix.lr=0.3", "schedule=constant", "train.dtype=float64", "train.steps=4",
        "eval.every=2", "train.micro_batch=2", "logger.every=1"]  # fmt: skip
KINDS["clipped"] = [*FREE, "optim.qk_clip=0.8"]
# Relative, over the steps that are compared.  Polar factors amplify rounding, so float32 is compared for 20 steps.
TOLERANCES = {"adamw-float32": (20, 2e-5), "muon-float32": (20, 1e-4)}
MODES = {1: ["single"], 2: ["ddp"], 3: ["fsdp"], 4: ["hsdp"]}
if "NANOMUON_SOAK" in os.environ:
    MODES = {1: ["single", "fsdp"], 2: ["ddp", "fsdp"], 3: ["fsdp", "ddp"], 4: ["hsdp", "fsdp", "ddp"]}
RECOMPUTED = "fsdp parallel.activation_checkpointing=selective"
MORE = {1: [("own", "fsdp")], 2: [("own", "fsdp")], 3: [("own", RECOMPUTED)], 4: []}


def train_all(rank: int, world_size: int, folder: str) -> None:
    """One job after the other in the same processes, as torchrun runs a sweep."""
    hooks.no_plot()
    jobs = {f"{kind} {mode}": [*KINDS[kind], f"parallel={mode}"] for mode in MODES[world_size] for kind in KINDS}
    jobs |= {f"{kind} {words}": [*KINDS[kind], *f"parallel={words}".split()] for kind, words in MORE[world_size]}
    if world_size == 1:
        jobs["free"] = [*FREE, "parallel=single"]
    for name, words in jobs.items():
        Trainer(load_config([*words, f"run.dir={folder}/{name.replace('=', ' ')}"], world_size)).run()
    teardown()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """``records(2)`` -> the folder with the jobs of two processes."""
    folder = tmp_path_factory.mktemp("invariance")

    @functools.cache
    def trained(processes: int) -> Path:
        run_workers(train_all, processes, folder, timeout=600, folder=f"{folder}/{processes}")
        return folder / str(processes)

    return trained


@pytest.mark.parametrize("processes", MODES)
def test_losses_do_not_depend_on_the_number_of_processes(records, processes):
    for folder in records(processes).iterdir():
        if folder.name == "free":
            continue
        kind = folder.name.split()[0]
        lines, alone = read_record(folder), read_record(records(1) / f"{kind} single")
        assert [line["step"] for line in lines] == list(range(len(alone)))
        steps, tolerance = TOLERANCES.get(kind, (STEPS, 1e-9))
        names = {"train/loss", "val/loss", *(["grad_norm"] if kind == "clipped" else [])}
        for line, reference in list(zip(lines, alone, strict=True))[: steps + 1]:
            for name in names & set(reference):
                assert line[name] == pytest.approx(reference[name], rel=tolerance), (folder.name, line["step"], name)


def test_what_is_compared_has_trained_and_clipped(records):
    own = read_record(records(1) / "own single")
    assert len(own) == 9 and own[-1]["val/loss"] < own[0]["val/loss"]
    clipped, free = (read_losses(records(1) / name) for name in ("clipped single", "free"))
    assert abs(clipped[-1][2] - free[-1][2]) > 1e-4


def test_torchrun_gives_the_same_bits(tmp_path, records):
    """And so does a command repeated: a sweep as users start it."""
    words = [*LONG, "parallel=ddp", "-m", "optim=adamw,muon", "train.dtype=float32,float64"]
    done = train(*words, f"hydra.sweep.dir={tmp_path}", ranks=2, timeout=400)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    for kind in SWEPT:
        (folder,) = tmp_path.glob("*{}*{}*".format(*kind.split("-")))
        for line, reference in zip(read_record(folder), read_record(records(2) / f"{kind} ddp"), strict=True):
            assert line.get("train/loss") == reference.get("train/loss")
            assert line.get("val/loss") == reference.get("val/loss")
