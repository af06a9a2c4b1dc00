"""What follows the backward pass, with every preset: on a GPU's tensors the host waits for nothing."""

from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from optim.routing import build_from_config
from tests.cuda.fake import LAYOUTS, Kernels, fake_cuda, parameters, with_gradients
from tests.optim.rules import find_rules
from tests.optim.test_configs import NAMES, settings
from tests.runs import TINY
from trainer.config import TrainConfig
from trainer.guard import NonFiniteGuard, QKClip
from trainer.launch import load_config
from trainer.loop import Trainer
from trainer.metrics.clock import Clock
from trainer.metrics.record import Metrics
from trainer.model import GPT, GPTConfig
from trainer.schedules.steps import Schedules

# In these steps: eigh's host looks whether it has failed.
WAITS = {"Shampoo": {1, 2, 8, 10}, "SOAP": {1}, "KLSOAP": {1}, "SOAPMuon": {1}}
STEPS = (1, 2, 3, 8, 10)
SHAPES = [(48, 16), (16, 16), (16, 64), (3, 16, 32)]


def is_engines(name: str) -> bool:
    """Whether the preset's matrices go through the exchange."""
    return settings(name, "tiny")["matrix"]["_target_"].startswith("optim.")


def go_on_from(step: int, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = step


@pytest.mark.parametrize("name, layout", [(name, layout) for name in NAMES for layout in LAYOUTS
                                          if layout == "fsdp" or is_engines(name)])  # fmt: skip
def test_guard_clip_and_optimizer_with_every_preset(name, layout):
    with fake_cuda(layout) as parallel:
        with torch.device("cuda"):
            model = GPT(GPTConfig(n_layer=1, n_embd=64), vocab_size=250, seq_len=16)
        with_gradients(model, parallel)
        optimizers = build_from_config(model, settings(name, "tiny"), parallel.replicas)
        guard = NonFiniteGuard(TrainConfig(), parallel.device)
        loss = torch.zeros((), dtype=torch.float64, device="cuda")
        before = [(p.device, p.dtype, p.shape) for p in model.parameters()]
        for member in optimizers.members.values():
            go_on_from(4, member)  # no new roots are due
        with Kernels() as gpu:
            norm = parallel.clip(model, 1.0)
            skipped = guard.step(optimizers, 5, torch.stack([loss, norm.double()]))
        assert skipped.device == norm.device == parallel.device
        assert [(p.device, p.dtype, p.shape) for p in model.parameters()] == before
        assert not gpu.crossings
        for member in optimizers.members.values():
            for state in member.state.values():
                devices = {key: value.device.type for key, value in state.items() if isinstance(value, torch.Tensor)}
                assert all(device == "cuda" or (key, device) == ("step", "cpu") for key, device in devices.items())


@pytest.mark.parametrize("rule", find_rules(), ids=lambda rule: rule.__name__)
def test_the_host_waits_where_the_rule_says_so(rule):
    with fake_cuda("fsdp") as parallel:
        optimizer = rule(parameters(SHAPES, parallel))
        waited = set()
        for step in STEPS:
            go_on_from(step - 1, optimizer)
            try:
                optimizer.step()
            except DataDependentOutputException:
                waited.add(step)
    assert waited == WAITS.get(rule.__name__, set())


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("rule", find_rules(), ids=lambda rule: rule.__name__)
def test_products_are_made_in_the_dtype_that_was_asked_for(rule, dtype):
    """By default bfloat16 where the rule allows it; what a rule keeps beside that is float32, and so is what float32
    parameters of other rules send."""
    with fake_cuda("fsdp") as parallel:
        sent = {layout.exchange.comm_dtype for layout in rule(parameters(SHAPES, parallel), dtype=dtype)._layouts}
        optimizer = rule(parameters(SHAPES, parallel, torch.bfloat16 if dtype is None else dtype), dtype=dtype)
        go_on_from(4, optimizer)
        with Kernels() as gpu:
            optimizer.step()
        owned = {value.dtype for state in optimizer.state.values() for key, value in state.items()
                 if key not in optimizer._shard_keys}  # fmt: skip
    low = dtype is None and rule.half_precision
    assert sent == ({torch.bfloat16} if low else {torch.float32})
    assert set(gpu.products) <= ({torch.bfloat16} if low else {torch.float32})
    assert owned <= {torch.float32}


def test_from_one_line_of_the_record_to_the_next_the_host_waits_for_nothing():
    """The Trainer's own loop, but for the passes, of which fake tensors have no backward one."""
    words = ("logger.every=10", "eval.every=50", "train.steps=100", "lookahead.size=0.3", "average.blend=0.5")
    config = load_config([*TINY, "optim=muon", "run.dir=unused", *words])
    with fake_cuda("single") as parallel:
        with torch.device("cuda"):
            model = GPT(config.model, vocab_size=250, seq_len=16)

        def passes(step: int) -> torch.Tensor:
            with_gradients(model, parallel)
            return torch.zeros((), dtype=torch.float64, device="cuda")

        trainer = object.__new__(Trainer)
        trainer.config, trainer.parallel, trainer.model, trainer.forward_backward = config, parallel, model, passes
        trainer.optimizers = build_from_config(model, asdict(config.optim), None)
        trainer.schedules = Schedules(config, model, trainer.optimizers)
        trainer.qk_clip, trainer.guard = QKClip(50.0, model, parallel), NonFiniteGuard(config.train, parallel.device)
        trainer.metrics = Metrics(config, parallel, display=SimpleNamespace())
        trainer.clock, trainer.shares = Clock(), torch.tensor([384, 1], device="cuda")
        trainer.profile = SimpleNamespace(update=lambda step: nullcontext())
        trainer.preemption = SimpleNamespace(start_poll=lambda: None, finish_poll=lambda: (None, False))
        trainer.checkpoints = SimpleNamespace(poll=lambda wait: None, group=None)
        trainer.progress = SimpleNamespace(step=7, val_step=0)
        with pytest.raises(DataDependentOutputException):
            trainer.train()
    assert trainer.progress.step == 10, "where the next line is due"
