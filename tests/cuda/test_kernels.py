"""What a step asks of a GPU, counted for GPT-2 124M's matrices and held against budget.json, which only shrinks.

A foreach operation counts as one kernel; torch cuts long lists into a few launches.
"""

import json
from pathlib import Path

import pytest
import torch

from optim import SOAP, Muon, NorMuon, Shampoo
from optim.routing import Optimizers
from tests.cuda.fake import GPT2, Kernels, fake_cuda, parameters
from trainer.guard import guarded_step

BUDGET = json.loads((Path(__file__).parent / "budget.json").read_text())
RULES = {"Muon": Muon, "NorMuon": NorMuon, "SOAP": SOAP, "Shampoo": Shampoo}


@pytest.mark.parametrize("name, layout", [(name, layout) for name in BUDGET for layout in BUDGET[name]])
def test_kernels_of_a_step(name, layout):
    rule, _, guarded = name.partition(", ")
    with fake_cuda(layout) as parallel:
        named = [(f"{i}", parameter) for i, parameter in enumerate(parameters(GPT2, parallel))]
        optimizer = RULES[rule](named, process_group=parallel.replicas)
        for group in optimizer.param_groups:
            group["step"] = 4
        with Kernels() as gpu:
            if guarded:
                optimizers = Optimizers({"matrix": optimizer}, {name: "matrix" for name, _ in named})
                guarded_step(optimizers, torch.tensor(False, device="cuda"))
            else:
                optimizer.step()
    budget, most = BUDGET[name][layout], gpu.kernels.most_common(6)
    assert gpu.count <= budget, f"{gpu.count} kernels, {budget} are allowed: {most}"
    assert gpu.count >= 0.9 * budget, f"write {gpu.count} down in budget.json, so that it stays so"
