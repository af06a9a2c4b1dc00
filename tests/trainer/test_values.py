"""Values that would do harm only later, in the middle of a run, are told before anything starts."""

import pytest

from common import UserError
from tests.errors import raises_naming
from trainer.launch import load_config

LATE = {
    "schedule.matrix.momentum=[[0,0.9],[300,1.0]]": ["momentum=1 in update 300"],
    "schedule.matrix.momentum=[[0,0.9],[300,0.9],[300,-0.1]]": ["momentum=-0.1 in update 300"],
    "schedule.matrix={weight_decay: [[0,0.1],[1.0,-1]]}": ["weight_decay=-0.99725 in update 399"],
    "schedule.matrix.momentum=[[0,0.9],[300,nan]]": ["schedule.matrix.momentum", "[length, value]"],
    "schedule.matrix.momentum=[[0,0.9],[2.5,0.8]]": ["schedule.matrix.momentum", "whole numbers of steps"],
    "optim=soap;schedule.matrix.update_freq=[[0,10],[300,20]]": ["update_freq=10.0333 in update 1", "whole number"],
    "optim=adamw;schedule.matrix.weight_decay=[[0,1],[300,-2]]": ["schedule.matrix", "weight_decay", "update 299"],
    "optim.matrix.bucket_bytes=9;schedule.matrix.bucket_bytes=[[0,9],[300,2]]": ["cannot change", "optim.matrix"],
    "optim.matrix.by_name={*.q.*: {momentum: 0.5}};schedule.matrix.momentum=[[0,0.9]]": ["by_name.*.q.*", "one of"],
    "schedule.warmup=inf": ["schedule.warmup=inf", "a fraction of the run"],
    "schedule.matrix={decay: x}": ["schedule.matrix.decay=x", "a number"],
    "schedule.name=power;schedule.power=inf": ["schedule.power=inf", "above 0"],
    "lookahead.size=nan": ["lookahead.size=nan", "give 0"],
    "lookahead.start=2.5": ["lookahead.start=2.5", "whole number"],
    "average.stop=inf": ["average.stop=inf", "whole number"],
    "optim.head.eps=inf": ["optim.head.eps=inf", "finite"],
    "train.clip=inf": ["train.clip=inf", "above 0"],
    "eval.target=nan": ["eval.target=nan", "above 0"],
    "train.timeout_minutes=1e300": ["train.timeout_minutes=1e+300", "below 525600"],
    "parallel.timeout_minutes=0": ["parallel.timeout_minutes=0", "above 0"],
    "run.from=": ["run.from=", "empty"],
    "run.dir=' '": ["run.dir= ", "empty"],
}


@pytest.mark.parametrize("overrides", LATE)
def test_it_is_told_at_the_start(overrides):
    with raises_naming(UserError, *LATE[overrides]):
        load_config(["experiment=smoke", *overrides.split(";")])


def test_lines_that_stay_within_what_the_optimizer_takes():
    points = "[[300,0.9],[1.0,1.0]]"  # at the end, after the last update, 1 is never in force
    config = load_config(["experiment=smoke", f"schedule.matrix.momentum={points}"])
    assert config.schedule.lines("matrix", 400)["momentum"](399) == pytest.approx(0.999)
    load_config(["experiment=smoke", "optim=soap", "schedule.matrix.update_freq=[[0,10],[300,10],[300,20]]"])
