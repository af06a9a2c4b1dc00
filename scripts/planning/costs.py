"""What a run costs, from its config and shapes alone; see plan.py."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import groupby
from unittest import mock

import hydra
import torch
import torch.distributed as dist
from planning.devices import DEVICES
from planning.live_bytes import LiveBytes, PassBytes, pass_bytes

from common import UserError
from data import load_tokenizer, open_split
from optim import routing
from optim.combined import Combined
from optim.elementwise import Elementwise
from optim.exchange import Exchange, plan_exchange
from optim.matrix import MatrixOptimizer
from optim.named_state import init_state, named_tensors
from optim.plan import IN_FLIGHT, Plan, shard_rows, worth_sharing
from optim.stacks import matrix_shape
from trainer.config import Config, Dtype, divisors, fitting_micro_batch, world_size
from trainer.language_model import model_class, one_line
from trainer.launch.compose import check, check_choices, hydra_initialized, to_hydra
from trainer.mesh import check_parallel, shard_group_size
from trainer.schedules.steps import Schedules

VOCABULARY = {"gpt2": 50257, "byte": 257}


def compose(overrides: Sequence[str], device: str, ranks: int | None = None) -> Config:
    """The config as it would be on that device; its ``run.processes`` is ``ranks``, or what the overrides say, or what
    is here. Raises UserError."""
    overrides = [to_hydra(override) for override in overrides]
    with hydra_initialized(overrides):
        composed = hydra.compose("train", overrides=overrides)
        check_choices(composed, overrides)
        ranks = composed.run.processes = ranks or composed.run.processes or ranks_here()
        if composed.train.dtype == Dtype.auto:
            composed.train.dtype = Dtype.float32 if device == "cpu" else Dtype.bfloat16
        given = composed.train.micro_batch
        config = check(composed, ranks)
    if given is None:  # what fits is another number on a GPU
        memory = DEVICES[device].memory if device in DEVICES else None
        config.train.micro_batch = fitting_micro_batch(config, sequences(config, ranks), memory)
    return config


def sequences(config: Config, ranks: int) -> int:
    """Of one rank, in one update."""
    return config.train.batch_tokens // config.train.seq_len // ranks


def ranks_here() -> int:
    """Processes that the launcher has started, or one a GPU."""
    return world_size() if world_size() > 1 else max(1, torch.cuda.device_count())


def computed_bytes(plan: Plan, owned: Sequence[int], itemsize: int, state: Sequence[int]) -> int:
    """Most that an owner's matrices of a bucket take while they are computed, one stack of equal ones after another.

    A stack of several has a joined copy of their ``state``."""
    most = results = 0
    for _, of in groupby(owned, key=lambda i: plan.specs[i].stack):
        stack = list(of)
        workspace = sum(plan.specs[i].workspace for i in stack) - (state[stack[0]] if len(stack) == 1 else 0)
        most = max(most, results + int(workspace))
        results += itemsize * sum(plan.specs[i].numel for i in stack)
    return most


class Costs:
    """Numbers of a run on ``config.run.processes`` ranks that need not exist; bytes unless said otherwise."""

    def __init__(self, config: Config, device: str):
        ranks = config.run.processes or 1
        self.config, self.device, self.ranks, self.train = config, device, ranks, config.train
        self.mode = check_parallel(config.parallel, ranks if ranks > 1 else None)
        self.shards = {"fsdp": ranks, "hsdp": 1}.get(self.mode, 1)  # ranks that hold one copy together
        if self.mode == "hsdp":
            with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(min(8, ranks))):
                self.shards = shard_group_size(config.parallel, ranks)
        self.sharded = self.mode in ("fsdp", "hsdp")
        self.split, self.no_data = None, ""
        try:
            self.split = open_split(config.data)
        except UserError as error:
            self.no_data = str(error)
        name = config.data.tokenizer or "gpt2"
        vocabulary = self.split.vocab_size if self.split else VOCABULARY.get(name) or load_tokenizer(name).vocab_size
        with torch.device("meta"):
            self.model = model_class(config.model._target_)(config.model, vocabulary, config.train.seq_len)
        self.width = {Dtype.bfloat16: 2, Dtype.float32: 4, Dtype.float64: 8}[config.train.dtype]  # of an activation
        self.model.to(torch.float64 if self.width == 8 else torch.float32)
        self.weight_bytes = max(4, self.width)
        self.optimizers = self._optimizers()
        self.copies = Schedules(config, self.model, self.optimizers).state()  # averages of the weights
        self.matrices = [member for member in self.optimizers.members.values() if isinstance(member, MatrixOptimizer)]
        alone = [layout.exchange for member in self.matrices for layout in member._layouts]
        self.shared = self.mode == "hsdp" and all(map(self._shares, alone))
        self.exchanges = [(self._plan(exchange), exchange.comm_dtype) for exchange in alone]

    @property
    def passes(self) -> int:
        """Micro-batches of a rank in one update."""
        return sequences(self.config, self.ranks) // self.train.micro_batch

    @property
    def layout(self) -> str:
        """Of the matrix exchange."""
        return "sharded" if self.shards > 1 else "replicated" if self.mode == "ddp" else "single"

    @property
    def group(self) -> int:
        """Ranks over which each matrix is preconditioned once."""
        return self.ranks if self.mode == "ddp" or self.shared else self.shards

    def _shares(self, alone: Exchange) -> bool:
        """Whether the copies of an HSDP mesh share the work on matrices, as optim/layout.py decides it."""
        how = (self.config.optim.matrix or {}).get("share", "auto")
        copies = self.ranks // self.shards
        pays = copies > 1 and worth_sharing(alone.plan.specs, self.shards, copies, alone.comm_dtype.itemsize)
        return how == "always" or (how == "auto" and pays)

    def _plan(self, alone: Exchange) -> Plan:
        specs, rest = alone.plan.specs, (alone.comm_dtype, alone.bucket_bytes)
        if self.shared:
            rows, ranks = plan_exchange(specs, "sharded", self.shards, *rest), range(self.ranks)
            copies = tuple(rank // self.shards for rank in ranks)
            regions = [tuple(rows.region(i, rank % self.shards) for rank in ranks) for i in range(len(specs))]
            specs = [replace(spec, regions=of, copies=copies) for spec, of in zip(specs, regions, strict=True)]
        return plan_exchange(specs, "sharded" if self.shared else self.layout, self.group, *rest)

    def _optimizers(self) -> Combined:
        config = asdict(self.config.optim)
        for role in routing.ROLES:
            if not config[role]:
                continue
            config[role].pop("fused", None)  # of kernels only, and there are none for the meta device
            rule, _ = routing.resolve_target(config[role], f"optim.{role}")
            if issubclass(rule, MatrixOptimizer) and rule.half_precision and self.device != "cpu" and self.width < 8:
                config[role].setdefault("dtype", "bfloat16")  # its default on CUDA
        optimizers = routing.build_from_config(self.model, config, None, self.model.head)
        init_state(optimizers, (f"state.{name}.any" for name in optimizers.roles))
        for member in optimizers.members.values():
            if not isinstance(member, MatrixOptimizer):
                continue
            for group in member.param_groups if self.sharded else ():
                if any(len(matrix_shape(group, p.shape)) > 2 for p in group["params"]):
                    raise UserError("model: stacks of matrices (experts) cannot be planned yet where they are sharded: "
                                    "give parallel=ddp")  # fmt: skip
        return optimizers

    # Memory -------------------------------------------------------------------------------------------------

    def part(self, tensor: torch.Tensor, rank: int = 0) -> int:
        """What a rank holds of a tensor that is cut along its first dimension."""
        if not self.sharded or not tensor.numel() or not tensor.ndim:
            return tensor.nbytes
        return shard_rows(tensor.shape[0], self.shards, rank) * tensor.nbytes // tensor.shape[0]

    @cached_property
    def state_bytes(self) -> list[int]:
        """Optimizer state of every rank of a group."""
        held = [0] * self.group
        exchanges = iter(self.exchanges)
        for member in self.optimizers.members.values():
            owners, at_owner = {}, ()
            if isinstance(member, MatrixOptimizer):
                owners = {ref.param: owner for layout in member._layouts
                          for ref, owner in zip(layout.refs, next(exchanges)[0].owners, strict=True)}  # fmt: skip
                at_owner = {key for state in member.state.values() for key in state} - member._shard_keys
            for param, state in member.state.items():
                for key, value in state.items():
                    if not isinstance(value, torch.Tensor):
                        continue
                    if key in at_owner:
                        held[owners[param]] += value.nbytes
                    else:
                        held = [sum_ + self.part(value, rank % self.shards) for rank, sum_ in enumerate(held)]
        return held

    @property
    def owner_state(self) -> list[list[int]]:
        """Of every matrix of every exchange, what its owner alone keeps."""
        return [
            [sum(value.nbytes for key, value in member.state[ref.param].items()
                 if isinstance(value, torch.Tensor) and key not in member._shard_keys) for ref in layout.refs]
            for member in self.matrices for layout in member._layouts
        ]  # fmt: skip

    @cached_property
    def exchange_bytes(self) -> list[int]:
        """Most that buckets in flight and the one that is computed take on every rank of a group."""
        most = [0] * self.group
        for (plan, dtype), at_owner in zip(self.exchanges, self.owner_state, strict=True):
            buckets = plan.buckets(range(len(plan.specs)))
            copies = self.group // self.shards if self.shared else 1  # more goes back to owners' peers than came
            wholes = [sum(plan.specs[i].numel for indices in bucket for i in indices) for bucket in buckets]
            for rank in range(self.group):
                buffers = wholes
                if self.layout == "sharded":
                    mine = [sum(plan.shard_numel(i, rank) for indices in b for i in indices) for b in buckets]
                    owned = [copies * sum(plan.specs[i].numel for i in bucket[rank]) for bucket in buckets]
                    buffers = list(map(sum, zip(mine, owned, strict=True)))
                for at, bucket in enumerate(buckets):
                    in_flight = sum(buffers[max(0, at - 1) : at - 1 + IN_FLIGHT]) * dtype.itemsize
                    computed = computed_bytes(plan, bucket[rank], dtype.itemsize, at_owner)
                    most[rank] = max(most[rank], in_flight + computed)
        return most

    @cached_property
    def elementwise_bytes(self) -> int:
        """Most that a step of an elementwise optimizer of ours allocates; torch's fused ones allocate nothing."""
        most = 0
        for member in self.optimizers.members.values():
            if isinstance(member, Elementwise):
                for parameter in (p for group in member.param_groups for p in group["params"]):
                    parameter.grad = torch.empty_like(parameter)
                with LiveBytes() as step:
                    member.step()
                most = max(most, step.peak // self.shards)
        return most

    @cached_property
    def one_pass(self) -> PassBytes:
        """Of train.micro_batch sequences on one rank, before anything is sharded."""
        config, model = self.config, type(self.model)
        start = None  # on a GPU documents are kept apart by blocks, without a mask of B x T x T
        if config.data.document_mask and self.device == "cpu":
            start = self.split.eos if self.split else 0
        arguments = config.model, self.model.vocab_size, self.train.seq_len, start
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[self.width]
        shape = self.train.micro_batch, self.train.seq_len
        try:
            return pass_bytes(model, arguments, dtype, config.parallel.activation_checkpointing, shape)
        except Exception as error:  # of any author's class
            raise UserError(f"model: {model.__name__} cannot be run on tensors without data, from which its memory is "
                            f"counted ({one_line(error)}): let forward read no values") from None  # fmt: skip

    @cached_property
    def stays(self) -> dict[str, int]:
        """Bytes of the fullest rank between updates, by part."""
        stays = {"weights": sum(map(self.part, self.model.parameters())), "optimizer state": max(self.state_bytes)}
        if self.copies:
            stays["averages of weights"] = sum(map(self.part, self.copies.values()))
        return stays

    def memory(self, micro_batch: int) -> dict[str, int]:
        """Bytes of the fullest rank by part, and their peak."""
        stays, weights = self.stays, self.stays["weights"]
        elements = sum(p.numel() for p in self.model.parameters())
        several = micro_batch < sequences(self.config, self.ranks)
        activations = self.one_pass.activations * micro_batch // self.train.micro_batch
        passing = {}
        if self.sharded:  # the root stays whole, one block is at work, the next is on its way
            blocks = [sum(p.numel() for p in block.parameters()) for block in self.model.blocks]
            passing["gathered weights"] = self.width * (elements - sum(blocks) + 2 * max(blocks))
            if several:  # both until the last micro-batch
                passing["gathered weights"] = self.width * elements
                passing["whole gradients"] = self.weight_bytes * elements
        elif self.width == 2:
            passing["bfloat16 weights"] = 2 * elements
        # Gradients become whole while activations go; of several passes only the first begins without them. DDP's
        # buckets, in which they lie, stay.
        kept = self.weight_bytes / self.width / self.shards
        grown = self.one_pass.peak_with(kept) - self.one_pass.activations
        both = activations + (weights if several or self.mode == "ddp" else grown)
        step = {"exchange buckets": max(self.exchange_bytes)}
        if self.elementwise_bytes:
            step["elementwise step"] = self.elementwise_bytes
        # A rank that holds more state than another may exchange less at once.
        exchanging = max(map(sum, zip(self.state_bytes, self.exchange_bytes, strict=True))) - stays["optimizer state"]
        stepping = weights + max(exchanging, self.elementwise_bytes)
        peak = sum(stays.values()) + max(both + sum(passing.values()), stepping)
        passing = {"gradients": weights, "activations": activations} | passing
        return stays | passing | step | {"peak": peak}

    def checkpoint_bytes(self) -> int:
        """Weights and all state, whole."""
        tensors = [*self.model.parameters(), *named_tensors(self.optimizers).values(), *self.copies.values()]
        return sum(tensor.nbytes for tensor in tensors)

    def largest_micro_batch(self, room: float) -> int | None:
        fits = [n for n in divisors(sequences(self.config, self.ranks)) if self.memory(n)["peak"] <= room]
        return max(fits, default=None)

    # Work and traffic, a step -------------------------------------------------------------------------------

    @cached_property
    def rule_flops(self) -> list[float]:
        """Of the matrix rules on every rank of a group."""
        loads = [0.0] * self.group
        for plan, _ in self.exchanges:
            for spec, owner in zip(plan.specs, plan.owners, strict=True):
                loads[owner] += spec.flops
        return loads

    def flops(self) -> tuple[float, float, float]:
        """Of the model on all ranks, of the matrix rules on all ranks, of the rules on the busiest rank."""
        rules = sum(self.rule_flops) * (self.ranks // self.group)
        return self.model.flops_per_token() * self.train.batch_tokens, rules, max(self.rule_flops)

    def exchange_traffic(self) -> tuple[list[int], Counter[str]]:
        """Bytes that every rank of a group sends (of a broadcast: its payload), and collectives."""
        sent, calls = [0] * self.group, Counter[str]()
        for plan, dtype in self.exchanges if self.group > 1 else ():
            every = range(len(plan.specs))
            buckets = plan.buckets(every)
            calls["all_reduce of 16 bytes"] += 1
            if self.layout == "sharded":
                sent = [s + dtype.itemsize * plan.elements_sent(rank, every) for rank, s in enumerate(sent)]
                calls["all_to_all"] += 2 * len(buckets)
            else:
                calls["broadcast"] += sum(bool(indices) for bucket in buckets for indices in bucket)
                for spec, owner in zip(plan.specs, plan.owners, strict=True):
                    sent[owner] += dtype.itemsize * spec.numel
        return sent, calls

    def model_traffic(self) -> tuple[float, Counter[str]]:
        """Bytes that a rank sends in rings for weights and gradients, and collectives."""
        parameters, units = list(self.model.parameters()), len(self.model.blocks) + 1
        if self.mode == "ddp":
            sizes = [2**20, 25 * 2**20]  # DDP's: of the first bucket, of the others
            buckets, _ = dist._compute_bucket_assignment_by_size(parameters[::-1], sizes)
            whole = sum(p.nbytes for p in parameters)
            return 2 * whole * (self.ranks - 1) / self.ranks, Counter(all_reduce=len(buckets))
        if not self.sharded:
            return 0.0, Counter()
        shard = sum(map(self.part, parameters)) / self.weight_bytes  # elements; padded, as FSDP2 sends them
        block = sum(self.part(p) for b in self.model.blocks for p in b.parameters()) / self.weight_bytes
        peers, copies = self.shards - 1, self.ranks // self.shards
        again = self.passes == 1  # blocks in the backward pass; of several micro-batches the first's gathers are kept
        gathered = (shard + again * block) * peers * self.width
        reduced = shard * peers * self.weight_bytes + 2 * shard * self.weight_bytes * (copies - 1) / copies
        calls = Counter(all_gather=units + again * (units - 1), reduce_scatter=units)
        return gathered + reduced, calls + Counter(all_reduce=units if copies > 1 else 0)
