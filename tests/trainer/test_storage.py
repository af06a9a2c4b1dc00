"""Which checkpoint folders are found, and which of them stay."""

import json

from trainer.run import storage


def fake(checkpoints, step: int, loss: float | None) -> None:
    folder = storage.folder_of(checkpoints, step)
    folder.mkdir(parents=True)
    state = {"step": step, "val_step": step if loss is not None else 0, "val_loss": loss}
    (folder / storage.STATE).write_text(json.dumps(state))


def test_newest_and_best_stay(tmp_path):
    for step, loss in enumerate([5.0, 3.0, None, float("nan"), 4.0, 6.0], start=1):
        fake(tmp_path, step, loss)
    storage.prune(tmp_path, keep_last=1, keep_best=2)
    assert [storage.step_of(path) for path in storage.committed(tmp_path)] == [6, 5, 2]


def test_a_state_without_a_loss_is_none_of_the_best(tmp_path):
    for step in (1, 2):
        fake(tmp_path, step, 3.0)
    (storage.folder_of(tmp_path, 1) / storage.STATE).write_text("{}")
    storage.prune(tmp_path, keep_last=1, keep_best=1)
    assert [storage.step_of(path) for path in storage.committed(tmp_path)] == [2]


def test_partial_folders_are_no_checkpoints(tmp_path):
    fake(tmp_path, 3, None)
    storage.folder_of(tmp_path, 3).rename(storage.partial_of(storage.folder_of(tmp_path, 3)))
    assert storage.newest_good(tmp_path) == (None, [])
    storage.remove_partial(tmp_path)
    assert not list(tmp_path.iterdir())
