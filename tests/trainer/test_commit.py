"""Which checkpoint folders are found, and which of them stay."""

import json

from trainer import commit


def fake(checkpoints, step: int, loss: float | None) -> None:
    folder = commit.folder_of(checkpoints, step)
    folder.mkdir(parents=True)
    state = {"step": step, "val_step": step if loss is not None else 0, "val_loss": loss}
    (folder / commit.STATE).write_text(json.dumps(state))


def test_newest_and_best_stay(tmp_path):
    for step, loss in enumerate([5.0, 3.0, None, float("nan"), 4.0, 6.0], start=1):
        fake(tmp_path, step, loss)
    commit.prune(tmp_path, keep_last=1, keep_best=2)
    assert [commit.step_of(path) for path in commit.committed(tmp_path)] == [6, 5, 2]


def test_a_state_without_a_loss_is_none_of_the_best(tmp_path):
    for step in (1, 2):
        fake(tmp_path, step, 3.0)
    (commit.folder_of(tmp_path, 1) / commit.STATE).write_text("{}")
    commit.prune(tmp_path, keep_last=1, keep_best=1)
    assert [commit.step_of(path) for path in commit.committed(tmp_path)] == [2]


def test_partial_folders_are_no_checkpoints(tmp_path):
    fake(tmp_path, 3, None)
    commit.folder_of(tmp_path, 3).rename(commit.partial_of(commit.folder_of(tmp_path, 3)))
    assert commit.newest_good(tmp_path) == (None, [])
    commit.remove_partial(tmp_path)
    assert not list(tmp_path.iterdir())
