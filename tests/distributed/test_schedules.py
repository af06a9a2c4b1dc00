"""What is done to the weights around an update is the same on shards, on replicas and in one process, and resumes."""

import pytest

from tests.distributed.test_resume import EXACT, assert_same, losses, run

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
