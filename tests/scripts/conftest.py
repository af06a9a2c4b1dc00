"""What several tests of scripts share."""

import tempfile

import pytest

from tests.scripts.chromium import Browser


@pytest.fixture
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        opened = Browser(profile)
        try:
            yield opened
        finally:
            opened.close()
