"""The lock of a folder: one holder at a time, also while the folder and its lock file come and go."""

import multiprocessing
import os
from pathlib import Path

from data.lock import folder_lock


def take_turns(folder: Path) -> None:
    for _ in range(300):
        with folder_lock(folder, wait=True):
            os.close(os.open(folder / "in_use", os.O_CREAT | os.O_EXCL))  # FileExistsError if there is another holder
            (folder / "in_use").unlink()


def test_one_holder_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=take_turns, args=(tmp_path / "a" / "b",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert list((tmp_path / "a").iterdir()) == []


def test_a_folder_with_content_stays(tmp_path, mistake):
    with folder_lock(tmp_path):
        (tmp_path / "kept").touch()
        with mistake(f"data.dir={tmp_path}", "another preparation", "wait"), folder_lock(tmp_path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    with mistake(f"data.dir={tmp_path}/kept", "cannot be used", "choose another"), folder_lock(tmp_path / "kept"):
        pass
