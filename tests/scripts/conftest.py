"""What several tests of scripts share."""

import tempfile

import pytest
import torch

import trainer.parallel
from optim.matrix import local
from tests.scripts.chromium import Browser


@pytest.fixture
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        opened = Browser(profile)
        try:
            yield opened
        finally:
            opened.close()


@pytest.fixture
def filled(monkeypatch):
    """Initial weights without DTensor's caches, which take this process for the rank that it was first."""

    @torch.no_grad()
    def fill(model, seed):
        for parameter in model.parameters():
            local(parameter).fill_(0.01)

    monkeypatch.setattr(trainer.parallel, "initialise", fill)
