"""World-size invariance: the same losses on any number of processes under any sharding, for the whole program."""

import os
from pathlib import Path

import pytest

from tests.runs import TINY, read_losses, read_record, train

pytestmark = pytest.mark.slow
SMALL = [
    "experiment=smoke", "logger=jsonl", "model.n_layer=2", "model.n_embd=48", "train.seq_len=32",
    "train.batch_tokens=768", "train.micro_batch=2", "eval.every=8", "eval.tokens=1600", "train.clip=1.0",
]  # fmt: skip
JOBS = ["optim=adamw,muon", "train.dtype=float32,float64"]
STEPS = 60 if "NANOMUON_SOAK" in os.environ else 24
# Relative, over the steps that are compared.  Polar factors amplify rounding, so float32 is compared for 20 steps.
TOLERANCES = {("adamw", "float32"): (20, 2e-5), ("muon", "float32"): (20, 1e-4)}


def sweep(folder: Path, processes: int, mode: str) -> dict[tuple[str, str], list[dict]]:
    """All jobs in one command; (optimizer, dtype) -> lines of its record."""
    jobs = [*SMALL, f"train.steps={STEPS}", f"parallel={mode}", "-m", *JOBS, f"hydra.sweep.dir={folder}"]
    done = train(*jobs, ranks=processes, timeout=400)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    records = {}
    for path in folder.glob("*/metrics.jsonl"):
        config = path.with_name("config.yaml").read_text()
        key = ("muon" if "optim.Muon" in config else "adamw", "float64" if "float64" in config else "float32")
        records[key] = read_record(path.parent)
    assert len(records) == 4
    return records


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("alone"), 1, "single")


SOME = [(2, "ddp"), (3, "fsdp"), (4, "hsdp")]
ALL = [*SOME, (1, "fsdp"), (2, "fsdp"), (3, "ddp"), (4, "fsdp"), (4, "ddp")]


@pytest.mark.parametrize(("processes", "mode"), ALL if os.environ.get("NANOMUON_SOAK") else SOME)
def test_losses_do_not_depend_on_the_number_of_processes(tmp_path, alone, processes, mode):
    records = sweep(tmp_path / "runs", processes, mode)
    for key, lines in records.items():
        steps, tolerance = TOLERANCES.get(key, (STEPS, 1e-9))
        assert [line["step"] for line in lines] == list(range(STEPS + 1))
        for line, reference in list(zip(lines, alone[key], strict=True))[: steps + 1]:
            for name in {"train/loss", "val/loss"} & set(reference):
                assert line[name] == pytest.approx(reference[name], rel=tolerance), (key, line["step"], name)


def test_a_command_repeated_gives_the_same_bits(tmp_path, alone):
    again = sweep(tmp_path / "runs", 1, "single")
    for key, lines in again.items():
        for line, reference in zip(lines, alone[key], strict=True):
            assert line.get("train/loss") == reference.get("train/loss")
            assert line.get("val/loss") == reference.get("val/loss")


OWN = [
    "experiment=smoke", "logger=jsonl", "model=custom", "model._target_=examples.grouped_query_gpt.GroupedQueryGPT",
    "model.n_layer=2", "model.n_embd=48", "train.seq_len=32", "train.batch_tokens=768", "train.micro_batch=2",
    "train.steps=8", "eval.every=4", "eval.tokens=768", "train.clip=1.0", "train.dtype=float64",
]  # fmt: skip


@pytest.fixture(scope="module")
def own_alone(tmp_path_factory, template):
    folder = tmp_path_factory.mktemp("own") / "run"
    template.run([*OWN, "parallel=single", f"run.dir={folder}"])
    record = read_record(folder)
    assert len(record) == 9 and record[-1]["val/loss"] < record[0]["val/loss"]
    return record


@pytest.mark.parametrize(("processes", "words"), [
    (1, ["parallel=fsdp"]), (2, ["parallel=fsdp"]), (3, ["parallel=fsdp"]), (2, ["parallel=ddp"]),
    (3, ["parallel=fsdp", "parallel.activation_checkpointing=true"]),
])  # fmt: skip
def test_losses_of_a_model_of_ones_own_do_not_depend_on_the_number_of_processes(
    tmp_path, template, own_alone, processes, words
):
    template.run([*OWN, *words, f"run.dir={tmp_path / 'run'}"], processes, launched=True)
    for line, reference in zip(read_record(tmp_path / "run"), own_alone, strict=True):
        for name in {"train/loss", "val/loss"} & set(reference):
            assert line[name] == pytest.approx(reference[name], rel=1e-9), (line["step"], name)


CLIPPED = [*TINY, "optim=muon", "optim.matrix.lr=0.3", "optim.qk_clip=0.8", "schedule=constant", "train.dtype=float64",
           "train.steps=4", "eval.every=2", "train.micro_batch=2", "logger.every=1"]  # fmt: skip


def test_heads_are_clipped_by_the_logits_of_all_ranks(tmp_path, template):
    template.run([*CLIPPED, "parallel=single", f"run.dir={tmp_path / 'alone'}"])
    free = [word for word in CLIPPED if not word.startswith("optim.qk_clip")]
    template.run([*free, "parallel=single", f"run.dir={tmp_path / 'free'}"])
    alone, unclipped = (read_losses(tmp_path / name, missing=0.0) for name in ("alone", "free"))
    assert abs(alone[-1][2] - unclipped[-1][2]) > 1e-4
    for mode, processes in (("ddp", 2), ("fsdp", 3), ("hsdp", 4)):
        template.run([*CLIPPED, f"parallel={mode}", f"run.dir={tmp_path / mode}"], processes)
        for line, reference in zip(read_losses(tmp_path / mode, missing=0.0), alone, strict=True):
            assert line == pytest.approx(reference, rel=1e-9), (mode, line[0])
