"""What only a GPU can show, in one command of at most eight minutes: a JSON file and a Markdown table.

    python scripts/gpu_check.py --out results/gpu
    torchrun --nproc-per-node 8 scripts/gpu_check.py --out results/gpu
    python scripts/gpu_check.py --out /tmp/check --device cpu      small shapes, under a minute

It needs torch, numpy, hydra-core and omegaconf, and downloads nothing. Sections are independent: one that fails, or
takes longer than its share, is reported and the next one runs. Both files are written after every section.
"""

import argparse
import copy
import io
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as usual on Hopper; deterministic products ask for it

from common import write_json, write_text  # noqa: E402
from optim import Muon, layout  # noqa: E402
from optim.matrix import local  # noqa: E402
from optim.polar import POLAR_METHODS, Iteration, polar, polar_flops  # noqa: E402
from optim.precision import full_float32  # noqa: E402
from optim.regions import Place  # noqa: E402
from scripts.gpu.choices import CHOICES, Choice, torchs_choice  # noqa: E402
from scripts.gpu.program import train_twice  # noqa: E402
from scripts.gpu.report import Figures, estimate, require, section, table  # noqa: E402
from scripts.gpu.run import Run, same  # noqa: E402
from trainer.launch import load_config  # noqa: E402
from trainer.mesh import ParallelConfig, build_mesh, use_expandable_segments  # noqa: E402
from trainer.metrics.environment import peak_flops  # noqa: E402
from trainer.parallel import Parallel, unwrap  # noqa: E402

SECONDS = 120  # of one section at most
BATCH_TOKENS = 524288


@dataclass
class Processes:
    """What Parallel asks of Accelerate, which may be absent here."""

    device: torch.device
    num_processes: int
    process_index: int
    local_process_index: int
    trackers: list[Any] = field(default_factory=list)

    def reduce(self, value: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        if self.num_processes > 1:
            dist.all_reduce(value)
        return value


class Check:
    """Device, ranks and sizes; the sections are its methods."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
        self.ranks, self.rank = int(os.environ.get("WORLD_SIZE", 1)), rank
        use_expandable_segments()
        if self.on_gpu:
            torch.cuda.set_device(local_rank)
        self.device = torch.device("cuda", local_rank) if self.on_gpu else torch.device("cpu")
        store = None if "MASTER_ADDR" in os.environ else dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        backend = "cuda:nccl,cpu:gloo" if self.on_gpu else "gloo"
        more = dict(timeout=timedelta(minutes=2)) | (dict(device_id=self.device) if self.on_gpu else {})
        dist.init_process_group(backend, store=store, rank=rank, world_size=self.ranks, **more)
        self.processes = Processes(self.device, self.ranks, rank, local_rank)
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32

    # Parts ------------------------------------------------------------------------------------------------------

    def parallel(self, mode: str, dtype: torch.dtype, compiled: bool, recompute: str = "none") -> Parallel:
        config = ParallelConfig(mode=mode, compile=compiled, activation_checkpointing=recompute)
        mesh = build_mesh(config, mode, self.device.type, self.ranks)
        return Parallel(config, mode, self.processes, mesh, dtype, 0)  # type: ignore[arg-type]

    def run(self, model: str, dtype: torch.dtype | None = None, compiled: bool | None = None, recompute: str = "none",
            document_start: int | None = None, **settings: Any) -> Run:  # fmt: skip
        mode = "single" if self.ranks == 1 else "fsdp"
        compiled = self.on_gpu if compiled is None else compiled
        small = [] if self.on_gpu else ["model.n_layer=2", "model.n_embd=64", "model.n_head=2"]
        changes = [f"model.{key}={value}" for key, value in settings.items()]
        dtype = dtype or self.dtype
        torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")  # as the trainer does
        changes += ["optim.matrix.dtype=float32"] if dtype == torch.float32 else []
        config = load_config([f"model={model}", "optim=muon", "logger=jsonl", *small, *changes])
        return Run(self.parallel(mode, dtype, compiled, recompute), config, not self.on_gpu, document_start)

    def milliseconds(self, work: Callable[[], Any], repeats: int = 10) -> float:
        """Median, after one call that is not counted."""
        times = []
        for _ in range(repeats + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[1:])

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @property
    def peak(self) -> float | None:
        """Dense bf16 FLOP/s."""
        return peak_flops(self.device)

    # Sections ---------------------------------------------------------------------------------------------------

    def machine(self) -> Figures:
        found: Figures = dict(torch=torch.__version__, python=platform.python_version(), ranks=self.ranks,
                              attention=torchs_choice(self.device, self.dtype))  # fmt: skip
        if not self.on_gpu:
            return found | dict(device="cpu")
        properties = torch.cuda.get_device_properties(self.device)
        return found | dict(device=properties.name, memory_gib=properties.total_memory / 2**30, cuda=torch.version.cuda,
                            capability=f"{properties.major}.{properties.minor}", nccl=str(torch.cuda.nccl.version()))

    def exchange(self) -> Figures:
        """Sharded Muon over this backend against plain Muon: bit for bit where one rank holds all."""
        shapes = [(768, 768), (3072, 768), (770, 130)] if self.on_gpu else [(64, 64), (100, 33)]
        mesh = build_mesh(ParallelConfig(mode="fsdp"), "fsdp", self.device.type, self.ranks)
        torch.manual_seed(0)
        values = [torch.randn(shape, device=self.device) for shape in shapes]
        grads = [torch.randn(shape, device=self.device) for shape in shapes]
        alone = nn.ParameterList([nn.Parameter(value.clone()) for value in values])
        sharded = nn.ParameterList([nn.Parameter(value.clone()) for value in values])
        fully_shard(sharded, mesh=mesh)
        worst = 0.0
        for dtype in (torch.float32, torch.bfloat16):
            optimizers = [Muon(alone.parameters(), dtype=dtype)]
            one_rank = mock.patch.object(layout, "place_of", lambda param, *_: Place(
                tuple(param.shape), within=(0,), layout="sharded", group=mesh.get_group()))  # which it would keep there
            with one_rank if self.ranks == 1 else nullcontext():
                optimizers.append(Muon(sharded.parameters(), dtype=dtype))
            for _ in range(3):
                for whole, shard, grad in zip(alone, sharded, grads, strict=True):
                    whole.grad = grad.clone()
                    shard.grad = torch.distributed.tensor.distribute_tensor(grad, mesh, shard.placements)
                for optimizer in optimizers:
                    optimizer.step()
            pairs = zip(alone, sharded, strict=True)
            differences = [(shard.full_tensor() - whole).abs().max().item() for whole, shard in pairs]
            worst = max(worst, *differences)
        travelled = optimizers[1]._layouts[0].exchange.layout == "sharded"
        return require(travelled and worst <= (0.0 if self.ranks == 1 else 1e-2), largest_difference=worst)

    def no_waiting(self) -> Figures:
        """CUDA itself raises where the host waits for the device in a guarded step."""
        if not self.on_gpu:
            return dict(left_out="needs CUDA")
        run = self.run("gpt2_124m", n_layer=2)
        run.update()
        run.backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return dict(host_waits=0)

    def polar_factors(self) -> Figures:
        """Distance to the exact factor, ms and share of the card's peak of every method and dtype."""
        shape = (4, 768, 3072) if self.on_gpu else (1, 32, 96)
        torch.manual_seed(0)
        x = torch.randn(shape, device=self.device)
        exact = polar(x.double().cpu(), "svd")
        found: Figures = {}
        for method, dtype in ((m, d) for m in POLAR_METHODS for d in (torch.float32, torch.bfloat16)):
            if not isinstance(POLAR_METHODS[method], Iteration):
                continue
            y = x.to(dtype)
            with full_float32():
                factor = polar(y, method)
                took = self.milliseconds(lambda y=y, method=method: polar(y, method))
            name, error = f"{method} {str(dtype)[6:]}", (factor.double().cpu() - exact).norm() / exact.norm()
            found |= {f"{name} error": error.item(), f"{name} ms": took}
            if self.peak and dtype == torch.bfloat16:
                found[f"{name} of peak"] = polar_flops(shape, method, dtype=dtype) / took * 1e3 / self.peak
        return require(all(value < 1 for key, value in found.items() if key.endswith("error")), **found)

    def steps(self, model: str) -> Figures:
        """A whole update: ms, tokens/s, MFU, memory, graphs compiled after the first update."""
        run = self.run(model)
        run.fit()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        run.update()
        counters = torch._dynamo.utils.counters["stats"]
        graphs = counters["unique_graphs"]
        passes = max(1, BATCH_TOKENS // self.ranks // run.tokens_of_a_pass) if self.on_gpu else 2
        took = self.milliseconds(lambda: run.update(passes), 3)
        run.backward()
        optimizer, unguarded = self.milliseconds(run.step), self.milliseconds(run.optimizers.step)
        start = time.perf_counter()
        run.step()
        enqueued = 1e3 * (time.perf_counter() - start)  # about optimizer_ms where the host cannot keep up
        speed = passes * run.tokens_of_a_pass * self.ranks / took * 1e3
        found = dict(ms=took, optimizer_ms=optimizer, optimizer_enqueued_ms=enqueued, unguarded_ms=unguarded,
                     passes=passes, sequences_of_a_pass=run.sequences, tokens_per_s=speed,
                     recompilations=counters["unique_graphs"] - graphs)  # fmt: skip
        if self.peak:
            found["mfu"] = unwrap(run.model).flops_per_token() * speed / (self.peak * self.ranks)
        if self.on_gpu:
            found["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return require(found["recompilations"] == 0, **found)

    def little_room(self) -> Figures:
        """Sequences for which one rank's card has no room are halved on all, and training goes on."""
        if not self.on_gpu:
            return dict(left_out="needs CUDA")
        run = self.run("gpt2_124m", n_layer=2, compiled=False)
        run.fit()
        asked, _ = run.sequences, run.fit_in(1.0 if self.rank else 0.6)
        return require(run.sequences < asked and run.update().isfinite().item(), asked=asked, sequences=run.sequences)

    def choice(self, choice: Choice) -> Figures:
        """An update of one pass; what a card cannot do is left out."""
        if choice.gpu_only and not self.on_gpu:
            return dict(left_out="needs CUDA")
        try:
            with choice.within():
                run = self.run("gpt2_124m", **choice.settings)
                run.update()
                return dict(ms=self.milliseconds(run.update, 3))
        except RuntimeError as error:  # no such kernel, out of memory
            return dict(left_out=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")

    def profile(self) -> Figures:
        """Share of three updates in which the device has nothing to do."""
        if not self.on_gpu:
            return dict(left_out="needs CUDA")
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        run = self.run("gpt2_124m")
        run.update()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            start = time.perf_counter()
            for _ in range(3):
                run.update(2)
            self.wait()
            took = time.perf_counter() - start
        busy = sum(event.self_device_time_total for event in seen.key_averages()
                   if event.device_type == DeviceType.CUDA and not event.is_user_annotation) / 1e6  # fmt: skip
        return dict(idle=max(0.0, 1 - busy / took), ms=1e3 * took / 3, under_profiler=True)

    def not_finite(self) -> Figures:
        """An update whose loss is NaN changes nothing, and the next one is applied."""
        run = self.run("gpt2_124m", n_layer=2, compiled=False)
        run.update()
        before = run.snapshot()
        run.backward()
        local(next(run.model.parameters()).grad).fill_(torch.nan)
        run.step(torch.full((), torch.nan, dtype=torch.float64, device=self.device))
        run.optimizers.zero_grad()
        kept = same(before, run.snapshot())
        run.update()
        return require(kept and not same(before, run.snapshot()), unchanged=kept)

    def save_and_load(self) -> Figures:
        """Weights and state written, read by another run, and gone on with: bit for bit the same, where attention's
        backward pass adds up in a fixed order."""
        torch.use_deterministic_algorithms(True)
        try:
            return self._save_and_load()
        finally:
            torch.use_deterministic_algorithms(False)

    def _save_and_load(self) -> Figures:
        one, other = (self.run("gpt2_124m", n_layer=2, compiled=False) for _ in range(2))
        one.update()
        other.update()
        file = io.BytesIO()
        torch.save(one.snapshot(), file)
        one.update()
        file.seek(0)
        other.load(torch.load(file, weights_only=True))
        other.update()
        return require(same(one.snapshot(), other.snapshot()), bitwise=True)

    def program(self) -> Figures:
        return train_twice(self.on_gpu) if self.ranks == 1 else dict(left_out="for one process")

    def as_on_the_cpu(self) -> Figures:
        """Ten float32 losses of a small model, against those of this machine's CPU."""
        if self.ranks > 1:
            return dict(left_out="for one process")
        here, there = Check.__new__(Check), Check.__new__(Check)
        losses = []
        for check, device in ((here, self.device), (there, torch.device("cpu"))):
            vars(check).update(vars(self) | dict(device=device, on_gpu=False, processes=Processes(device, 1, 0, 0)))
            run = check.run("gpt2_124m", torch.float32, compiled=False)
            losses.append([run.update().item() for _ in range(10)])
        difference = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
        return require(difference < 1e-3 and losses[1][-1] < losses[1][0], relative_difference=difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="name of both files, without ending")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no further section begins")
    args = parser.parse_args()
    check, begin, results = Check(args.device), time.perf_counter(), {}
    sections: dict[str, Callable[[], Figures]] = {
        "machine": check.machine, "exchange": check.exchange, "host waits": check.no_waiting,
        "not finite": check.not_finite, "little room": check.little_room, "saved and loaded": check.save_and_load,
        "as on the CPU": check.as_on_the_cpu, "GPT-2 124M": lambda: check.steps("gpt2_124m"),
        "track 3": lambda: check.steps("track3_124m"), "polar factors": check.polar_factors,
        "profile": check.profile, "train.py": check.program, "on 8 devices": lambda: estimate(results),
    }  # fmt: skip
    sections |= {f"choice: {name}": partial(check.choice, choice) for name, choice in CHOICES.items()}
    for name, act in sections.items():
        left = 60 * args.minutes - (time.perf_counter() - begin)
        agreed = torch.tensor(left, device=check.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)  # all ranks run it, or none does
        results[name] = section(act, SECONDS) if agreed.item() > 0 else {"left_out": "no time is left"}
        if check.rank == 0:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out.with_suffix(".json"), copy.copy(results))
            write_text(args.out.with_suffix(".md"), table(results))
            print(f"{name}: {results[name]}", flush=True)
    dist.destroy_process_group()
    if any("failed" in found for found in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
