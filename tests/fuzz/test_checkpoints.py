"""Checkpoints whose state, index or manifest says something else, and whose hashes say that this is right.

Each is loaded with the tensors that the model needs, or answered with one line; ``make soak`` draws three hundred.
"""

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import UserError
from tests.fuzz.mutations import mutated
from tests.runs import SHORT
from trainer.loop import Trainer
from trainer.run import storage
from trainer.run.dcp_index import read_weights
from trainer.run.resume import changes

EXAMPLES = 300 if "NANOMUON_SOAK" in os.environ else 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory, configure):
    trainer = Trainer(configure(*SHORT, "optim=soap", f"run.dir={tmp_path_factory.mktemp('runs') / 'run'}"))
    trainer.run()
    return trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from([storage.STATE, storage.INDEX, storage.MANIFEST]))
def test_what_is_loaded_is_whole_or_answered_with_one_line(trained, tmp_path_factory, data, name):
    folder = storage.committed(trained.checkpoints.folder)[0]
    copied = shutil.copytree(folder, tmp_path_factory.mktemp("copy") / folder.name)
    whole = {key: value.shape for key, value in trained.checkpoints.model.state_dict().items()}
    content = data.draw(mutated(json.loads((folder / name).read_text())))
    (copied / name).write_text(json.dumps(content))
    if name != storage.MANIFEST:
        files = {path.name: storage.fingerprint(path) for path in copied.iterdir() if path.name != storage.MANIFEST}
        storage.write_manifest(copied, storage.step_of(copied), files)
    try:
        storage.verify(copied)
        weights = read_weights(copied)
        state = storage.read_state(copied)
        changes(state, trained.config, copied, trained.checkpoints.about)
        trained.checkpoints.load(copied)
    except UserError as error:
        assert "\n" not in str(error) and copied.name in str(error), str(error)
    else:
        assert {key: value.shape for key, value in weights.items()} == whole
        assert all(torch.isfinite(value).all() for value in weights.values())
    finally:
        trained.checkpoints.load(folder)
