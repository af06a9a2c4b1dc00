"""Tunes several optimizers with the same budget each, and runs the best of each on fresh seeds.

    python scripts/tune.py optim=adamw,muon,soap experiment=cpu_speedrun budget=20 folder=runs/tune
    python scripts/tune.py report=runs/tune             # what there is, without training

budget   full runs' worth of updates for each optimizer       (default: 20)
folder   of the study; the same command goes on with it, in several processes at once too   (default: runs/tune)
seeds    of the runs with the best settings; the tuning has seed=0       (default: 1,2,3)
Everything else is as for train.py.  docs/compare.md says what is done.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tuning import report, space  # noqa: E402
from tuning.objective import Objective, overrides_of, split_words, train  # noqa: E402
from tuning.study import Plan, Study, hold, locked, work  # noqa: E402

from common import UserError, write_json  # noqa: E402
from trainer.config import Config, world_size  # noqa: E402
from trainer.launch import load_config  # noqa: E402
from trainer.launch.processes import quoted  # noqa: E402
from trainer.run import resume  # noqa: E402

EQUAL = ("train.steps", "train.batch_tokens", "train.seq_len", "eval.every", "eval.tokens", "seed")
OWN = {"optim": "", "budget": "20", "folder": "runs/tune", "seeds": "1,2,3", "report": ""}


def main(words: list[str]) -> int:
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    own = OWN
    try:
        own, overrides = parse(words)
        if own["report"]:
            report.write([Path(folder) for folder in own["report"].split(",")])
            return 0
        tune(own, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, SQLAlchemyError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        print(f"error: {own['report'] or own['folder']}: {reason}", file=sys.stderr)
        return 1
    return 0


def parse(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """What is this program's own, and the overrides of every run."""
    own, overrides = split_words(words, OWN)
    if own["report"]:
        return own, overrides
    if not own["folder"].strip() or (Path(own["folder"]).exists() and not Path(own["folder"]).is_dir()):
        raise UserError(f"folder={own['folder']}: is no folder; give one, which need not exist")
    if not own["budget"].isdecimal() or not int(own["budget"]):
        raise UserError(f"budget={own['budget']}: give a whole number of full runs above 0")
    if not own["optim"]:
        raise UserError("optim= has no value: name the optimizers to tune, such as optim=adamw,muon")
    if not all(seed.isdecimal() for seed in own["seeds"].split(",")):
        raise UserError(f"seeds={own['seeds']}: give whole numbers, such as 1,2,3")
    for key in ("optim", "seeds"):
        if len(set(own[key].split(","))) < len(own[key].split(",")):
            raise UserError(f"{key}={own[key]}: one is given twice; give each once")
    if world_size() > 1:
        mend = "start tune.py without torchrun, and several times in one folder for several trials at once"
        raise UserError(f"WORLD_SIZE={world_size()}: a trial trains in one process; {mend}")
    if any(word.startswith(("run.", "hydra", "-")) for word in overrides):
        raise UserError(f"{' '.join(overrides)}: run.*, hydra.* and options are this program's own; give folder=DIR")
    return own, overrides


def tune(own: dict[str, str], overrides: list[str]) -> None:
    folder, seeds = Path(own["folder"]), list(map(int, own["seeds"].split(",")))
    configs = {name: load_config([*overrides, f"optim={name}"]) for name in own["optim"].split(",")}
    check_equal(configs)
    plan = make_plan(next(iter(configs.values())), int(own["budget"]))
    if plan.seed in seeds:
        raise UserError(f"seeds={own['seeds']} holds seed={plan.seed}, that of the tuning: choose fresh ones")
    spaces = {name: space.build(space.section([*overrides, f"optim={name}"]), config.optim)
              for name, config in configs.items()}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder, plan, overrides)
    studies = [Study(folder, name, plan, searched) for name, searched in spaces.items()]
    work(studies, Objective(folder, overrides), lambda: time.sleep(2))
    final(folder, studies, overrides, seeds)
    report.write([folder])


def check_equal(configs: Mapping[str, Config]) -> None:
    """Raises UserError: a preset has a budget or a measure of its own."""
    (first, one), *others = configs.items()
    for key in EQUAL:
        for name, other in others:
            here, there = attrgetter(key)(one), attrgetter(key)(other)
            if here != there:
                mend = f"give {key}=… for all, or tune them apart"
                raise UserError(f"optim={first} has {key}={here}, but optim={name} {there}: no equal budgets; {mend}")


def make_plan(config: Config, budget: int) -> Plan:
    steps, every = config.train.steps, config.eval.every
    if steps % every:
        raise UserError(
            f"train.steps={steps} is no multiple of eval.every={every}, in which a budget is counted: "
            f"give train.steps={max(1, round(steps / every)) * every}, or another eval.every"
        )
    return Plan(budget, steps, every, config.seed)


def settle(folder: Path, plan: Plan, overrides: list[str]) -> None:
    """Note in the folder what it is a study of.  Raises UserError: of another one."""
    path, mine = folder / "tune.json", {**asdict(plan), "overrides": sorted(overrides)}
    with locked(folder):
        if not path.exists():
            write_json(path, mine)
        theirs = report.read_plan(folder)
    different = [key for key in mine if theirs.get(key) != mine[key]]
    if different:
        said = "; ".join(f"{key} is {theirs.get(key)} there and {mine[key]} here" for key in different)
        raise UserError(f"folder={folder} holds another study: {said}; choose another folder")


def final(folder: Path, studies: list[Study], overrides: list[str], seeds: list[int]) -> None:
    """The best of every optimizer on fresh seeds, every second seed backwards; what another process does is its own."""
    for i, seed in enumerate(seeds):
        for study in studies[:: -1 if i % 2 else 1]:
            name = f"optim={study.name},seed={seed}"
            own = [f"run.dir={quoted(str(folder / 'final' / name))}", f"run.name='{name}'", "run.resume=restart"]
            own += [f"logger.label={study.name}", f"seed={seed}", "checkpoint.last=false"]
            config = load_config([*overrides, f"optim={study.name}", *overrides_of(study.best.params), *own])
            lock = hold(folder, f"final-{study.name}-{seed}")
            if lock is None or resume.finished(config):
                continue
            print(f"final {name}", flush=True)
            if not train(config, lambda step, loss: False):
                sys.exit("told to stop: start the same command again to go on")
            lock.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
