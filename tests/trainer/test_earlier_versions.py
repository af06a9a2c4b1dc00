"""What earlier versions have written: gone on from where it says the same in other words, named where it cannot be."""

import json
import shutil

import pytest

from common import UserError
from tests.errors import raises_naming
from tests.runs import read_losses
from trainer.run import storage
from trainer.run.checkpoint import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
# Of all kinds: with a value as default, with a list, of a model's class, of an optimizer's.
NEWER = ("lookahead.size", "average.exclude", "model.norm_eps", "optim.matrix.nesterov", "train.loss")


def forget(run, keys):
    """A run that has gone to update 4 in a version without these keys."""
    shutil.rmtree(run / "checkpoints" / "step_00000006", ignore_errors=True)
    folder = storage.folder_of(run / "checkpoints", 4)
    for path, section in ((run / "run.json", "identity"), (folder / storage.STATE, "config")):
        content = json.loads(path.read_text())
        content[section] = {key: value for key, value in content[section].items() if key not in keys}
        path.write_text(json.dumps(content))
    files = {path.name: storage.fingerprint(path) for path in folder.iterdir() if path.name != storage.MANIFEST}
    storage.write_manifest(folder, 4, files)


def test_a_run_of_before_a_key_existed_goes_on_with_its_default(run, tmp_path):
    whole = read_losses(run("run", "optim.matrix.nesterov=true").checkpoints.folder.parent)
    forget(tmp_path / "run", NEWER)
    with raises_naming(UserError, f"run.dir={tmp_path}/run", "lookahead.size is 0.0 there and 0.5 here"):
        run("run", "lookahead.size=0.5")
    with raises_naming(UserError, "step_00000004", "optim.matrix.nesterov is True there and False here"):
        run("other", f"run.from_={tmp_path / 'run'}", "optim.matrix.nesterov=false")
    run("run")  # nor does it matter that a default was given then
    assert read_losses(tmp_path / "run") == whole


def test_what_an_earlier_version_wrote_is_named(run, tmp_path):
    run("run")
    manifest_of = tmp_path / "run" / "checkpoints" / "step_00000006" / storage.MANIFEST
    manifest_of.write_text(manifest_of.read_text().replace(f'"format": {storage.FORMAT}', '"format": 1'))
    with raises_naming(CheckpointError, "step_00000006", "nanoMuon 0.1", "that version"):
        storage.verify(manifest_of.parent)
    mark = tmp_path / "run" / "run.json"
    mark.write_text(mark.read_text().replace('"format": 2,', ""))
    with raises_naming(UserError, f"run.dir={tmp_path}/run", "nanoMuon 0.1", "new run.dir"):
        run("run")


def test_a_checkpoint_of_before_the_index_is_named(run, tmp_path):
    folder = storage.committed(run("run").checkpoints.folder)[0]
    (folder / storage.INDEX).unlink()
    files = {path.name: storage.fingerprint(path) for path in folder.iterdir() if path.name != storage.MANIFEST}
    storage.write_manifest(folder, 6, files)
    with raises_naming(CheckpointError, folder.name, storage.INDEX, "run.init="):
        storage.verify(folder)
