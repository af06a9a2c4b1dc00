"""What a run will cost, before it starts: memory, FLOPs, bytes and collectives, tokens, checkpoints, time.

    python scripts/plan.py experiment=track3 --device h100 --ranks 8
    python scripts/plan.py experiment=track3 --device h100 --scale      on 1 to 1,024 ranks: a table and plan.png
    python scripts/plan.py runs/mine                                    a run that is there, beside what it has measured
    python train.py experiment=track3 plan=true plan.device=h100        the same program: plan.KEY=VALUE is --KEY VALUE

Takes the overrides of train.py. Starts nothing, and creates nothing but the picture: the model lies on the meta device,
and who owns which matrix follows from shapes. Exact are parameters, states, FLOPs by the model's and the rules' own
count, and bytes and collectives. Activations and logits are those of a pass over tensors without data, without
torch.compile; what is gathered and exchanged is an estimate; the allocator's losses and workspace of kernels are in
neither. Times are projected: planning/step.py says from what.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from planning.costs import Costs, compose  # noqa: E402
from planning.devices import DEVICES, device_of  # noqa: E402
from planning.measured import compared, read_run  # noqa: E402
from planning.scale import draw, scaled, table  # noqa: E402
from planning.step import projected, step_time  # noqa: E402
from planning.text import counted, print_rows, size  # noqa: E402

from common import UserError  # noqa: E402
from data.shards import open_shard  # noqa: E402
from optim.matrix import MatrixOptimizer  # noqa: E402
from trainer.metrics.console import duration  # noqa: E402
from trainer.metrics.environment import PEAK_FLOPS  # noqa: E402
from trainer.schedules.due import eval_is_due, is_time  # noqa: E402

USABLE = 0.9  # of it; the rest is the context's and the communication library's, or lost between blocks
PICTURE = Path("plan.png")


def main(arguments: Sequence[str] | None = None) -> int:
    if int(os.environ.get("RANK", 0)) > 0:  # under torchrun one says it
        return 0
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        plan(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for train.py, or a run's directory")
    parser.add_argument("--device", choices=[*DEVICES, "cpu"], help="of every rank (default: what is here)")
    parser.add_argument("--ranks", type=int, help="processes, eight a node (default: run.processes, or one a GPU)")
    parser.add_argument("--scale", nargs="?", const="true", choices=["true"], help=f"1 to 1,024 ranks, and {PICTURE}")
    parser.add_argument("--efficiency", type=float, default=0.6,
                        help="share of the peak FLOP/s that products of matrices reach (default: 0.6)")  # fmt: skip
    words = [re.sub(r"^plan\.(\w+)=", r"--\1=", word) for word in arguments if word != "plan=true"]
    return parser.parse_intermixed_args(words)


def plan(options: argparse.Namespace) -> None:
    """Raises UserError: the options, or the config, cannot be."""
    words, ranks, device, efficiency = options.words, options.ranks, options.device, options.efficiency
    if ranks is not None and ranks < 1 or not 0 < efficiency <= 1:
        raise UserError(f"--ranks {ranks} --efficiency {efficiency}: give at least 1 rank, and a share of the peak "
                        "above 0, at most 1")  # fmt: skip
    if odd := [word for word in words if word.partition("=")[0] == "plan"]:
        raise UserError(f"{odd[0]}: give plan=true, or leave it out to train")
    directory = next((word for word in words if "=" not in word and not word.startswith("~")), None)
    if directory is not None and (len(words) > 1 or ranks or device or options.scale):
        raise UserError(f"{directory}: a run's directory says its settings, ranks and device itself: give it alone")
    if directory is not None:
        costs = Costs(*read_run(Path(directory)))
        show(costs, efficiency)
        seconds = sum(step_time(costs, efficiency).values()) if projected(costs) else None
        print_rows(f"{directory}, beside it", compared(costs, evaluations(costs), seconds))
        return
    device = device or (device_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu")
    if not options.scale:
        show(Costs(compose(words, device, ranks), device), efficiency)
        return
    every, faults = scaled(words, device)
    first = every[0]
    print(f"{first.config.run.name} on {device}, {first.train.batch_tokens:,} tokens an update; nothing was started")
    print(*table(every, efficiency), sep="\n")
    for number, fault in faults.items():
        print(f"{number:5} {fault}")
    draw(every, efficiency, PICTURE)
    print(f"{PICTURE}: the same, drawn")


def show(costs: Costs, efficiency: float) -> None:
    config, mode = costs.config, costs.mode
    if mode == "hsdp":
        mode += f", {costs.ranks // costs.shards} copies over {costs.shards} ranks each"
    print(f"{config.run.name}: {costs.ranks} x {costs.device}, {mode}, {config.train.dtype}; nothing was started")
    print_parameters(costs)
    print_rows("memory of the fullest rank", memory(costs))
    print_rows("an update", update(costs))
    print_rows("the run", run(costs))
    print_rows(f"projected, products at {efficiency:g} of the peak", time(costs, efficiency))


def print_parameters(costs: Costs) -> None:
    rows = costs.optimizers.table()
    print_rows("parameters", {row["role"]: f"{row['parameters']:>15,}  {row['optimizer']}, {row['tensors']} tensors"
                              for row in rows} | {"all": f"{sum(row['parameters'] for row in rows):>15,}"})  # fmt: skip


def memory(costs: Costs) -> dict[str, str]:
    micro_batch = costs.train.micro_batch
    parts = costs.memory(micro_batch)
    rows = {name: f"{size(value):>15}" for name, value in parts.items()}
    rows["activations"] += "  and logits, of blocks that are not compiled"
    rows["peak"] += "  what stays, with what a pass or what the exchange adds, whichever is more"
    room = device_bytes(costs)
    best = costs.largest_micro_batch(USABLE * room)
    rows["micro-batch"] = f"{micro_batch:>15}  sequences; {best or 'none'} at most in {USABLE:.0%} of {size(room)}"
    return rows


def device_bytes(costs: Costs) -> float:
    """Memory of one rank: of a card, or an equal share of this machine's."""
    if costs.device in DEVICES:
        return DEVICES[costs.device].memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / costs.ranks


def update(costs: Costs) -> dict[str, str]:
    forward_backward, rules, busiest = costs.flops()
    train, passes = costs.train, f"{costs.passes} pass{'es' * (costs.passes > 1)}"
    others = [type(m).__name__ for m in costs.optimizers.members.values() if not isinstance(m, MatrixOptimizer)]
    rows = {
        "tokens": f"{train.batch_tokens:>15,}  {passes} of {train.micro_batch} sequences a rank",
        "model": f"{forward_backward / 1e12:>15,.3f}  TFLOP",
        "matrix rules": f"{rules / 1e12:>15,.3f}  TFLOP, {busiest / 1e12:,.3f} on the busiest rank",
    }
    if others:
        rows["matrix rules"] += f" (elementwise, not counted: {', '.join(sorted(set(others)))})"
    sent, calls = costs.exchange_traffic()
    if calls:
        rows["matrix exchange"] = f"{size(max(sent)):>15}  sent by the busiest rank, {size(sum(sent) / len(sent))} on "
        rows["matrix exchange"] += f"average; {counted(calls)}"
    sent, calls = costs.model_traffic()
    if calls:
        rows["weights, gradients"] = f"{size(sent):>15}  sent by each rank in rings; {counted(calls)}"
    return rows


def run(costs: Costs) -> dict[str, str]:
    config, steps = costs.config, costs.train.steps
    needed = steps * costs.train.batch_tokens
    there = f"none prepared: {costs.no_data}".replace(str(Path.home()), "~")
    if costs.split:
        tokens = sum(len(open_shard(file)) for file in costs.split.train)
        there = f"{tokens:,} prepared, read {needed / tokens:.2f} times"
    elif config.data.source == "sample":
        there = "none prepared; the run writes them when it starts"
    saved, every = config.checkpoint, config.checkpoint.every
    count = sum(is_time(every, step, steps) for step in range(1, steps)) + saved.last
    kept = min(count, saved.keep_last + saved.keep_best)
    also = f", and one every {saved.minutes:g} minutes" if saved.minutes else ""
    return {
        "updates": f"{steps:>15,}",
        "tokens": f"{needed:>15,}  {there}",
        "evaluations": f"{evaluations(costs):>15,}  of {config.eval.tokens:,} tokens",
        "checkpoints": f"{count:>15,}  of {size(costs.checkpoint_bytes())}{also}; {kept} kept",
    }


def evaluations(costs: Costs) -> int:
    return sum(eval_is_due(costs.config, step) for step in range(costs.train.steps + 1))


def time(costs: Costs, efficiency: float) -> dict[str, str]:
    if not projected(costs):
        return {"time": "not projected: a peak is known for bfloat16 on GPUs only"}
    parts = step_time(costs, efficiency)
    step = sum(parts.values())
    speed = PEAK_FLOPS[costs.device.upper()] * efficiency * costs.ranks
    forward = costs.model.flops_per_token() / 3 * costs.config.eval.tokens / speed
    training, evaluating = step * costs.train.steps, forward * evaluations(costs)
    total = training + evaluating
    return {
        **{name: f"{seconds * 1e3:>12,.1f} ms" for name, seconds in parts.items()},
        "an update": f"{step * 1e3:>12,.1f} ms  {costs.train.batch_tokens / step:,.0f} tokens/s",
        "training": f"{duration(training):>15}",
        "evaluations": f"{duration(evaluating):>15}  forward passes alone",
        "all": f"{duration(total):>15}  {total / 3600 * costs.ranks:,.2f} GPU-hours, without start and compilation",
    }


if __name__ == "__main__":
    sys.exit(main())
