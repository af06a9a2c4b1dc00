"""What the message of an error owes its reader: one line with the key or file, its value, and what to do instead."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def raises_naming(kind: type[Exception], *words: object) -> Iterator[None]:
    """An error of this kind, whose message is one line that names all of these.

    ::

        with raises_naming(UserError, "train.steps=0", "above 0"):
            load_config(["train.steps=0"])
    """
    message = None
    try:
        yield
    except kind as error:  # which is let go of here, and with it the files and locks that its traceback holds
        message = str(error)
    assert message is not None, f"no {kind.__name__}"
    check_names(message, *words)


def check_names(message: str, *words: object) -> None:
    """The same of a message that is already there, as in what a process has printed."""
    assert words and len(message.splitlines()) == 1, f"not one line: {message}"
    missing = [word for word in map(str, words) if word not in message]
    assert not missing, f"{missing} not in: {message}"


def error_lines(output: str) -> list[str]:
    """What a program said to its user, among what torch, torchrun and other libraries say."""
    return [line for line in output.splitlines() if line.startswith("error: ")]
