"""What a run has measured, beside what is planned for its own settings, ranks and device."""

import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from planning.costs import Costs
from planning.devices import device_of
from planning.text import size

from common import UserError
from trainer.config import Config
from trainer.language_model import one_line, resolve_model
from trainer.metrics.jsonl import FILE, read_lines
from trainer.run import storage

OURS = re.compile(r"trainer\.model\.GPT|(torch\.)?optim\.\w+")  # classes that a file may name: they are imported


def read_run(directory: Path) -> tuple[Config, str]:
    """The config of a run's directory, with the ranks that it last had, and its device.

    Raises UserError: it holds no run, or one that names classes of other people's.
    """
    try:
        found = OmegaConf.load(directory / "config.yaml")
        for target in targets(OmegaConf.to_container(found)):
            if not OURS.fullmatch(target):
                raise UserError(f"{directory}: its {target} is not a class of nanoMuon's or torch's, and a file is not "
                                "to run code: give KEY=VALUE as for train.py")  # fmt: skip
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), found))
        config.model = resolve_model(config.model)
        environment = json.loads((directory / "environment.json").read_text())
        config.run.dir, config.run.processes = str(directory), int(environment["world_size"])
        return config, device_of(environment["device"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{directory}: not the directory of a run ({one_line(error)}): give one, or KEY=VALUE as for "
                        "train.py") from None  # fmt: skip


def targets(value: object) -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from [str(inner)] if key == "_target_" else targets(inner)


def compared(costs: Costs, evaluations: int, seconds: float | None) -> dict[str, str]:
    """Rows of planned and measured numbers; ``seconds``: of an update, None where nothing is projected."""
    config, lines = costs.config, read_lines(costs.config.run.path / FILE)
    done = lines[-1]["step"] if lines else 0
    begin = max((i for i, line in enumerate(lines) if "run" in line), default=0)  # on the ranks that it last had
    speeds = [line["perf/tokens_per_s"] for line in lines[begin:] if line.get("perf/tokens_per_s")]
    speed = statistics.median(speeds) if speeds else None
    memory = max((line.get("perf/peak_memory_bytes") or 0 for line in lines[begin:]), default=0)
    saved = storage.committed(config.run.checkpoints)
    flops, tokens = costs.flops()[0], costs.train.batch_tokens
    on_cpu = costs.device == "cpu"
    return {
        "": f"{'planned':>15} {'measured':>15}    ratio",
        "updates": row(costs.train.steps, done, "{:,}".format),
        "evaluations": row(evaluations, sum("val/loss" in line for line in lines), "{:,}".format),
        "a checkpoint": row(costs.checkpoint_bytes(), bytes_in(saved[0]) if saved else None, size),
        "peak memory": row(costs.memory(costs.train.micro_batch)["peak"], memory or None, size, not on_cpu)
        + on_cpu * "  measured with Python and its libraries",
        "an update": row(seconds, speed and tokens / speed, lambda value: f"{value * 1e3:,.1f} ms"),
        "tokens/s": row(seconds and tokens / seconds, speed, "{:,.0f}".format),
        "TFLOP/s": row(seconds and flops / seconds / 1e12, speed and flops / tokens * speed / 1e12, "{:,.3f}".format),
    }


def row(planned: float | None, measured: float | None, form: Callable[[float], str], comparable: bool = True) -> str:
    """A dash where there is no number, and for the ratio of what is not comparable."""
    ratio = f"{measured / planned:8.3f}" if planned and measured is not None and comparable else f"{'-':>8}"
    return " ".join(f"{'-' if value is None else form(value):>15}" for value in (planned, measured)) + f" {ratio}"


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
