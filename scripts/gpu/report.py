"""What a section of gpu_check.py found, or why it found nothing, and the table of all."""

import gc
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Figures = dict[str, Any]


def require(holds: bool, **found: Any) -> Figures:
    return found if holds else found | {"failed": "not as it must be"}


def estimate(results: dict[str, Figures]) -> Figures:
    """Of an update on 8 such devices: passes divide, matrices divide, and what travels goes at 300 GB/s."""
    one = results.get("GPT-2 124M", {})
    if "tokens_per_s" not in one or results["machine"]["ranks"] != 1:
        return dict(left_out="needs the step of one device")
    passes = one["ms"] - one["optimizer_ms"]
    travels = 1e3 * (3 * 2 * 124e6 + 2 * 2 * 85e6 / 8) / 300e9  # bf16 gathers, reductions, exchange
    return dict(ms=passes / 8 + one["optimizer_ms"] / 8 + travels, projected=True)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def section(act: Callable[[], Figures], seconds: float) -> Figures:
    start = time.perf_counter()
    try:
        with at_most(seconds):
            found = act()
    except Exception as error:  # whatever it is, the next section runs
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
    gc.collect()  # models and what was compiled for them
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def table(results: dict[str, Figures]) -> str:
    lines = ["| section | figure | value |", "|---|---|---|"]
    for name, found in results.items():
        for key, value in found.items():
            lines.append(f"| {name} | {key} | {f'{value:.4g}' if isinstance(value, float) else value} |")
    return "\n".join(lines) + "\n"
