"""What a message of an error owes its reader: the setting, its value and what to write instead."""

from contextlib import contextmanager

import pytest


@contextmanager
def raises_naming(kind, *words):
    """An error of this kind, with all of these words in it."""
    with pytest.raises(kind) as caught:
        yield
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
