"""What is done to the weights around an update is the same on shards, on replicas and in one process, and resumes."""

import pytest

from tests.distributed import hooks
from tests.distributed.harness import run_workers
from tests.distributed.test_resume import EXACT, SOAK, assert_same, losses, run
from tests.runs import ROOT
from tests.trainer.test_track3 import begin_with_factors

pytestmark = pytest.mark.slow
# The look-ahead shifts and the average runs when the first two jobs stop, after updates 6 and 12.
WORDS = [*EXACT, "optim=muon", "train.steps=18", "eval.every=2", "train.loss=sum", "schedule.horizon=20",
         "schedule.matrix.momentum=[[0, 0.85], [8, 0.95], [14, 0.85]]", "lookahead.size=0.3", "lookahead.decay=0.9",
         "lookahead.start=2", "lookahead.stop=14", "average.blend=0.6", "average.length=4", "average.start=5",
         "average.exclude=[embedding]"]  # fmt: skip


def test_lookahead_average_and_sum_on_shards_and_replicas(template, tmp_path):
    run(template, [*WORDS, f"run.dir={tmp_path}/whole"], ("single", 1))
    for first, second in (("fsdp", "ddp"), ("ddp", "fsdp")):
        words = [*WORDS, f"run.dir={tmp_path}/{first}"]
        run(template, words, (first, 2), ["send", {"step": 5, "to": 0}])
        run(template, words, (first, 2), ["send", {"step": 11, "to": 1}])
        assert "going on after update 12 of 18" in run(template, words, (second, 2)).output()
        assert_same(losses(f"{tmp_path}/{first}"), losses(tmp_path / "whole"), 1e-9)


STEPS = 40 if SOAK else 24
RECORDS = ["experiment=track3_cpu", "train.dtype=float64", "model.n_layer=1", "model.n_head=1", "model.n_embd=8",
           "model.zero_init_proj=false", "train.seq_len=16", "train.batch_tokens=384", "eval.tokens=768",
           f"train.steps={STEPS}", "eval.every=6", "logger.every=1", "checkpoint.every=7",
           "checkpoint.keep_last=9"]  # fmt: skip
NAMES = sorted(path.stem for path in (ROOT / "configs/optim/track3").glob("*.yaml"))
FACTORS = ("shampoo", "soap_muon_44", "soap_muon_46")  # their roots and bases hang on rounding at low rank


def train_all(rank: int, world_size: int, jobs: list[list[str]]) -> None:
    from trainer.launch.compose import load
    from trainer.loop import Trainer

    hooks.no_plot()
    for words in jobs:
        trainer = Trainer(load(words, world_size))
        if trainer.progress.step == 0 and trainer.config.optim.name.removeprefix("track3_") in FACTORS:
            begin_with_factors(trainer)
        trainer.run()


def test_track_3s_records_sharded_from_the_first_update_and_going_on(tmp_path):
    """On shards with replicas, and from their checkpoint on three shards; the whole also on replicas and on shards
    alone, each of which goes on from the other's."""
    names = NAMES if SOAK else ["muonh", "normuon", "shampoo", "soap_muon_46"]
    runs = [("single", "single", 1, ""), ("hsdp", "hsdp", 4, ""), ("fsdp3", "fsdp", 3, "hsdp/{}@21")]
    if SOAK:
        runs += [("ddp", "ddp", 2, ""), ("fsdp", "fsdp", 2, ""), ("fsdp2", "fsdp", 2, "ddp/{}@14")]
        runs += [("ddp2", "ddp", 2, "fsdp/{}@14")]
    for folder, layout, ranks, source in runs:
        common = [*RECORDS, f"parallel={layout}"]
        begins = [[f"run.from={tmp_path}/{source.format(name)}"] if source else [] for name in names]
        jobs = [[*common, f"optim=track3/{name}", f"run.dir={tmp_path}/{folder}/{name}", *begin]
                for name, begin in zip(names, begins, strict=True)]  # fmt: skip
        run_workers(train_all, ranks, tmp_path, jobs=jobs)
        for name in names:
            assert_same(losses(tmp_path / folder / name), losses(tmp_path / "single" / name), 1e-9)
