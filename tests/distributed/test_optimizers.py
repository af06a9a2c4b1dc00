"""`optim=NAME` for every name: the whole program gives the same losses on one process and on three FSDP ranks."""

import os

import pytest

from tests.runs import ROOT, TINY, read_record

pytestmark = pytest.mark.slow
NAMES = sorted(path.stem for path in (ROOT / "configs" / "optim").glob("*.yaml"))
# A rule of every kind: elementwise of torch and of ours, without state, with state at owners, with statistics.
SOME = ["adamw", "lion", "normuon", "scion", "shampoo", "soap", "steepest"]
# torch's own Muon orthogonalizes in bfloat16, whatever the dtype of the weights.  Shampoo's first statistics are nearly
# singular: float32 rounding decides their smallest eigenvalues, whose roots are the largest.
TOLERANCES = {("torch_muon", "float64"): 1e-2, ("torch_muon", "float32"): 1e-2, ("shampoo", "float32"): 2e-3}


@pytest.mark.parametrize("name", NAMES if os.environ.get("NANOMUON_SOAK") else SOME)
def test_losses_do_not_depend_on_the_number_of_processes(template, tmp_path, name):
    for dtype, steps, tolerance in (("float64", 12, 1e-9), ("float32", 6, 1e-4)):
        records = []
        for ranks in (1, 3):
            folder = tmp_path / f"{dtype}-{ranks}"
            template.run([*TINY, f"optim={name}", f"train.dtype={dtype}", f"train.steps={steps}", "eval.every=6",
                          f"run.dir={folder}"], ranks)  # fmt: skip
            records.append(read_record(folder))
        alone, sharded = records
        assert [line["step"] for line in alone] == [line["step"] for line in sharded] == list(range(steps + 1))
        assert alone[-1]["val/loss"] < alone[0]["val/loss"]
        for here, there in zip(alone, sharded, strict=True):
            for key in {"train/loss", "val/loss"} & set(here):
                expected = pytest.approx(here[key], rel=TOLERANCES.get((name, dtype), tolerance))
                assert there[key] == expected, (name, dtype, here["step"], key)
