"""From the command line, or from Python, to a job: composition, sweeps, processes."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "load_config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer.launch.compose import load_config  # only here: it imports Hydra

    return load_config
