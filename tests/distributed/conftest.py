"""The process that training jobs are forked from."""

import pytest

from tests.distributed.jobs import Template


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    with Template(tmp_path_factory.mktemp("jobs")) as started:
        yield started
