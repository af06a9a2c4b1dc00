"""The record says which source made the run, and keeps it where no commit has it."""

import subprocess
import tarfile

import pytest

from trainer.metrics import source


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with two tracked files, and the folder of a run."""
    root, run = tmp_path / "code", tmp_path / "run"
    root.mkdir()
    run.mkdir()
    monkeypatch.setattr(source, "ROOT", root)
    source.tracked_files.cache_clear()
    (root / "train.py").write_text("first\n")
    (root / "gone.py").write_text("")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=root, check=True)
    yield root, run
    source.tracked_files.cache_clear()


def test_a_clean_checkout_is_its_commit(checkout):
    root, run = checkout
    (root / "notes.txt").write_text("not tracked")
    assert source.keep_source(run) == f"commit {source.git('rev-parse', 'HEAD').strip()}" and not list(run.iterdir())


def test_changed_files_are_kept_as_they_are_and_no_others(checkout):
    root, run = checkout
    (root / "train.py").write_text("second\n")
    (root / "gone.py").unlink()
    (root / ".env").write_text("TOKEN=secret")
    said = source.keep_source(run)
    (archive,) = run.iterdir()
    assert said == f"{archive.name}, changed since commit {source.git('rev-parse', 'HEAD').strip()}"
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["source/train.py"] and tar.extractfile("source/train.py").read() == b"second\n"
        assert {(m.uid, m.uname, m.mtime) for m in tar} == {(0, "", 0)}
    source.tracked_files.cache_clear()
    (root / "train.py").touch()
    assert source.keep_source(run) == said and len(list(run.iterdir())) == 1
    source.tracked_files.cache_clear()
    (root / "train.py").write_text("third\n")
    assert source.keep_source(run) != said and len(list(run.iterdir())) == 2, "a resumed run keeps what it began with"


def test_what_cannot_be_kept_is_said(checkout, monkeypatch):
    root, run = checkout
    (root / "train.py").write_text("second\n")
    monkeypatch.setattr(source, "LIMIT", 3)
    assert source.keep_source(run).startswith("not recorded: changed since commit")
    monkeypatch.setattr(source, "ROOT", run)
    assert source.keep_source(run) == source.NONE and not list(run.iterdir())


def test_a_folder_inside_another_checkout_is_none(checkout, monkeypatch):
    root, run = checkout
    (root / "site-packages").mkdir()
    monkeypatch.setattr(source, "ROOT", root / "site-packages")
    assert source.keep_source(run) == source.NONE
