"""Validation loss by frequency and by position: parts of val/loss, alike on any number of ranks."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UserError
from data import IGNORE_INDEX
from tests.errors import raises_naming
from tests.runs import TINY, read_record, train
from trainer.evaluate.validation import frequency_bins, loss_bins, members, token_counts, validation_batches

BINS = ["eval.by_frequency=3", "eval.by_position=4", "train.dtype=float64"]


def in_bins(line: dict, what: str) -> dict[str, float]:
    return {key.rpartition("/")[2]: value for key, value in line.items() if key.startswith(f"val/by_{what}/")}


def test_bins_by_hand():
    """Each token lies where its middle lies, among all that were counted, sorted."""
    counts = torch.tensor([15, 0, 55, 15, 15])
    assert frequency_bins(counts, 2).tolist() == [1, 1, 0, 1, 1]
    assert frequency_bins(counts, 4).tolist() == [2, 3, 1, 3, 3], "the first is in the bin of its middle"
    targets = torch.tensor([[2, 0, IGNORE_INDEX, 1]])
    bins = {"frequency": (2, frequency_bins(counts, 2)), "position": (2, torch.tensor([0, 0, 1, 1]))}
    first, second, early, late = (found.tolist() for found in members(targets, bins))
    assert [first[0][i] for i in (0, 1, 3)] == [True, False, False] and second[0][3]
    assert (early, late) == ([[True, True, False, False]], [[False, False, True, True]])


def test_weighted_means_are_the_loss(run, tmp_path):
    """And the losses are those of the same run without bins; counts come from all of the training shards."""
    trainer, folder = run("run", *BINS), tmp_path / "run"
    plain = run("plain", "train.dtype=float64") and read_record(tmp_path / "plain")
    split, parallel = trainer.split, trainer.parallel
    counts = token_counts(split, parallel)
    text = np.concatenate([np.fromfile(file, dtype=np.uint16)[512:] for file in split.train])
    assert counts.tolist() == np.bincount(text, minlength=split.vocab_size).tolist()
    bins = loss_bins(trainer.config, split, parallel)
    targets = [targets for _, targets in validation_batches(trainer.config, split, parallel)]
    weights = [sum(int((found & (t != IGNORE_INDEX)).sum()) for t, found in zip(targets, of_bin, strict=True))
               for of_bin in zip(*([*members(t, bins)] for t in targets), strict=True)]  # fmt: skip
    lines = read_record(folder)
    assert [line.get("train/loss") for line in lines] == [line.get("train/loss") for line in plain]
    for line, other in zip(lines, plain, strict=True):
        if "val/loss" not in line:
            continue
        parts = [*in_bins(line, "frequency").values(), *in_bins(line, "position").values()]
        assert len(parts) == 7 and len(set(parts)) == 7
        assert math.isclose(line["val/loss"], other["val/loss"], rel_tol=1e-12)
        assert not in_bins(other, "frequency") and not in_bins(other, "position")
        for mine in (slice(0, 3), slice(3, 7)):
            mean = sum(w * x for w, x in zip(weights[mine], parts[mine], strict=True)) / sum(weights[mine])
            assert math.isclose(mean, line["val/loss"], rel_tol=1e-12)
    assert lines[-1]["val/by_frequency/1_of_3"] < lines[-1]["val/by_frequency/3_of_3"], "rare bytes are harder"


def test_a_token_that_is_not_in_the_vocabulary(run):
    trainer = run("run")
    trainer.split.vocab_size = 100
    with raises_naming(UserError, str(trainer.split.train[0]), "vocabulary of 100"):
        loss_bins(SimpleNamespace(eval=SimpleNamespace(by_frequency=2, by_position=None), train=trainer.config.train),
                  trainer.split, trainer.parallel)  # fmt: skip


def test_a_model_that_has_only_the_sum(configure):
    words = ["model=custom", "model._target_=examples.grouped_query_gpt.GroupedQueryGPT"]
    with raises_naming(UserError, "eval.by_position", "GroupedQueryGPT", "reduction"):
        configure(*TINY[:2], *words, "eval.by_position=4")


@pytest.mark.slow
def test_three_ranks_and_one(tmp_path):
    for ranks in (0, 3):
        done = train(*TINY, *BINS, "train.steps=4", "eval.every=2", f"run.dir={tmp_path}/{ranks}", ranks=ranks)
        assert done.returncode == 0, done.stderr
    for one, three in zip(*(read_record(tmp_path / ranks) for ranks in ("0", "3")), strict=True):
        for what in ("frequency", "position"):
            assert in_bins(one, what) == pytest.approx(in_bins(three, what), rel=1e-9)
    assert len(in_bins(three, "frequency")) == 3
