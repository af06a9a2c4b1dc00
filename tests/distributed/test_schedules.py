"""What is done to the weights around an update is the same on shards, on replicas and in one process, and resumes."""

import pytest

from tests.distributed import hooks
from tests.distributed.harness import run_workers
from tests.distributed.test_resume import EXACT, SOAK, assert_same, losses, run
from tests.runs import ROOT

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


# Eight columns, so that factors of 32 x 32 have full rank when others take over, after update 7: before that, roots and
# bases hang on rounding.  The look-ahead ends with update 16, the average begins with 20.
RECORDS = ["experiment=track3_cpu", "train.dtype=float64", "model.n_layer=1", "model.n_head=1", "model.n_embd=8",
           "model.zero_init_proj=false", "train.seq_len=16", "train.batch_tokens=384", "eval.tokens=768",
           "train.steps=24", "eval.every=6", "logger.every=1", "checkpoint.every=7",
           "checkpoint.keep_last=9"]  # fmt: skip
NAMES = sorted(path.stem for path in (ROOT / "configs/optim/track3").glob("*.yaml"))


def train_all(rank: int, world_size: int, jobs: list[list[str]]) -> None:
    from trainer.launch.compose import load
    from trainer.loop import Trainer

    hooks.no_plot()
    for words in jobs:
        Trainer(load(words, world_size)).run()


def test_track_3s_records_go_on_sharded(tmp_path):
    """One process's checkpoint on replicated shards, and theirs on three shards."""
    names = NAMES if SOAK else ["muonh", "normuon", "shampoo", "soap_muon_46"]

    def jobs(layout: str, source: str = "") -> list[list[str]]:
        common = [*RECORDS, f"parallel={layout}"]
        places = [(name, [f"run.from={tmp_path}/{source.format(name)}"] if source else []) for name in names]
        return [[*common, f"optim=track3/{n}", f"run.dir={tmp_path}/{layout}/{n}", *begin] for n, begin in places]

    run_workers(train_all, 1, tmp_path, jobs=jobs("single"))
    run_workers(train_all, 4, tmp_path, jobs=jobs("hsdp", "single/{}@7"))
    run_workers(train_all, 3, tmp_path, jobs=jobs("fsdp", "hsdp/{}@21"))
    for name in names:
        for layout in ("hsdp", "fsdp"):
            assert_same(losses(tmp_path / layout / name), losses(tmp_path / "single" / name), 1e-9)
