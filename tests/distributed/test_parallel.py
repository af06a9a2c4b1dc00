"""One model, one batch, any number of processes and any arrangement of them: the same numbers."""

import os
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from common import UserError
from tests.distributed.harness import run_workers
from trainer.model import GPT, GPTConfig
from trainer.parallel import Parallel, ParallelConfig, initialise, local, setup, unwrap
from trainer.run.storage import CheckpointError

# 6 rows on 4 ranks leave one shard empty; 6 on 3 are even, 128 on 3 are not.
TIED = GPTConfig(
    family="gpt2", init="gpt2", n_layer=2, n_head=2, n_embd=6, norm="layernorm", activation="gelu", tied=True, bias=True
)
UNTIED = GPTConfig(
    family="modern", n_layer=2, n_head=2, n_embd=8, position="half_rope", embed_norm=True, qk_norm=True, softcap=15.0
)
MODELS = {"tied": TIED, "untied": UNTIED}
VOCABULARY, LENGTH, SEQUENCES, STEPS = 70, 9, 24, 4


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def shares(parallel: Parallel, step: int, micro_batches: int = 2) -> list[torch.Tensor]:
    """This rank's slice of the step's batch, in micro-batches."""
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return list(tokens.chunk(parallel.world_size)[parallel.rank].chunk(micro_batches))


def backward(parallel: Parallel, model: torch.nn.Module, step: int) -> torch.Tensor:
    """One accumulated backward pass; returns the global mean loss."""
    parts, total = shares(parallel, step), 0.0
    tokens = sum(part[:, 1:].numel() for part in parts)
    for i, part in enumerate(parts):
        with parallel.accumulate(model, last=i + 1 == len(parts)):
            loss = model(part[:, :-1], part[:, 1:]) / tokens
            loss.backward()
        total = total + loss.detach()
    return parallel.sum(total) / parallel.world_size


def train(parallel: Parallel, config: GPTConfig) -> dict:
    """A few clipped AdamW steps; everything that should not depend on the arrangement."""
    model = parallel.wrap(config, VOCABULARY, LENGTH)
    parameters = dict(unwrap(model).named_parameters())
    result = {"initial": {name: full(p) for name, p in parameters.items()}, "losses": [], "norms": []}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        result["losses"].append(backward(parallel, model, step).item())
        if step == 0:
            result["gradients"] = {name: full(p.grad) for name, p in parameters.items()}
        result["norms"].append(parallel.clip(model, 0.5).item())
        if step == 0:
            result["clipped"] = {name: full(p.grad) for name, p in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
    with parallel.evaluation(model):
        part = shares(parallel, 0, micro_batches=1)[0]
        result["evaluation"] = parallel.sum(model(part[:, :-1], part[:, 1:])).item()
    assert all(isinstance(p, DTensor) == (parallel.mesh is not None) for p in model.parameters())
    result["weights"] = {name: full(p) for name, p in parameters.items()}
    return result


def every_arrangement(rank: int, world_size: int) -> dict:
    modes = {1: ["single", "ddp", "fsdp"], 4: ["ddp", "fsdp", "hsdp"]}.get(world_size, ["ddp", "fsdp"])
    results = {}
    for dtype in ("float32", "float64"):
        for mode in [*modes, *(["fsdp again"] if dtype == "float32" else [])]:
            for name, config in MODELS.items():
                parallel = setup(ParallelConfig(mode=mode.split()[0]), dtype=dtype, seed=3)
                results[f"{dtype} {mode} {name}"] = train(parallel, config)
                parallel.close()
    return results


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict:
    results = run_workers(every_arrangement, 1, tmp_path_factory.mktemp("reference"))[0]
    return {key.replace("single ", ""): value for key, value in results.items() if "single" in key}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_numbers_do_not_depend_on_the_arrangement(world_size, reference, tmp_path):
    results = run_workers(every_arrangement, world_size, tmp_path)
    assert len(results[0]) == 2 * {1: 7, 4: 7}.get(world_size, 5)
    for key in results[0]:
        dtype, name = key.split()[0], key.split()[-1]
        expected = reference[f"{dtype} {name}"]
        rtol, atol = {"float32": (2e-5, 1e-5), "float64": (1e-11, 1e-12)}[dtype]
        for result in (ranks[key] for ranks in results):
            assert result.keys() == expected.keys()
            for what in expected:
                same = what == "initial"
                torch.testing.assert_close(
                    result[what], expected[what], rtol=0 if same else rtol, atol=0 if same else atol,
                    msg=lambda text, key=key, what=what: f"{key}: {what}: {text}",
                )  # fmt: skip
    for key in [key for key in results[0] if "again" in key]:
        torch.testing.assert_close(results[0][key], results[0][key.replace(" again", "")], rtol=0, atol=0)


# --- communication ---


def hold_back(rank: int, world_size: int) -> dict:
    found = {}
    for mode in ("ddp", "fsdp"):
        parallel = setup(ParallelConfig(mode=mode), dtype="float64")
        model = parallel.wrap(TIED, VOCABULARY, LENGTH)
        grads = []
        for i, part in enumerate(shares(parallel, 0)):
            with parallel.accumulate(model, last=i == 1):
                model(part[:, :-1], part[:, 1:]).backward()
            grads.append(full(next(model.parameters()).grad))
        found[mode] = grads
    return found


@pytest.mark.slow
def test_gradients_travel_after_the_last_micro_batch_only(tmp_path):
    first, second = run_workers(hold_back, 2, tmp_path)
    for mode in ("ddp", "fsdp"):
        assert not torch.equal(first[mode][0], second[mode][0])  # each still has its own
        assert torch.equal(first[mode][1], second[mode][1])


def between_ranks(rank: int, world_size: int, folder: str) -> dict:
    parallel = setup(ParallelConfig(mode="hsdp", shard_size=2))
    assert (parallel.rank, parallel.world_size, parallel.is_main) == (rank, world_size, rank == 0)
    parallel.barrier()
    parallel.synchronize()
    value = torch.tensor([float(rank), 1.0])

    def fail(error: Exception) -> None:
        raise error

    def raised(method, error: Exception) -> str:
        """What rank 0's error is on this rank."""
        try:
            method(lambda: fail(error) if rank == 0 else None)
        except UserError as met:
            return f"{type(met).__name__}: {met}"
        return "none"

    result = {
        "sum": parallel.sum(value), "value": value,
        "object": parallel.broadcast_rank0(lambda: {"folder": f"runs/{rank}"}),
        "errors": [raised(method, error) for method in (parallel.broadcast_rank0, parallel.once_a_node)
                   for error in (UserError("a"), CheckpointError("b"), FileNotFoundError(2, "missing", "c.bin"))],
        "group": dist.get_process_group_ranks(parallel.shard_group), "mesh": parallel.mesh.mesh.tolist(),
        "memory": parallel.peak_memory_bytes(),
    }  # fmt: skip
    parallel.once_a_node(lambda: Path(folder, str(rank)).touch())
    parallel.close()
    return result


@pytest.mark.slow
def test_reductions_groups_and_rank0s_values_and_errors(tmp_path):
    (tmp_path / "touched").mkdir()
    results = run_workers(between_ranks, 4, tmp_path, folder=str(tmp_path / "touched"))
    assert [path.name for path in (tmp_path / "touched").iterdir()] == ["0"]
    for rank, result in enumerate(results):
        assert result["sum"].tolist() == [6, 4] and result["value"].tolist() == [rank, 1]  # the argument is left alone
        assert result["object"] == {"folder": "runs/0"}
        for errors in (result["errors"][:3], result["errors"][3:]):
            assert errors[:2] == ["UserError: a", "CheckpointError: b"]
            assert errors[2].startswith("UserError: c.bin: missing")
        assert result["group"] == ([0, 1] if rank < 2 else [2, 3]) and result["mesh"] == [[0, 1], [2, 3]]
        assert 50e6 < result["memory"] < 50e9


# --- initialisation ---


def initialise_watched(rank: int, world_size: int) -> dict:
    """Initialise shards while counting how many whole tensors live at the same time."""
    alive, most, init_parameter = [], 0, GPT.init_parameter

    def watched(*args):
        nonlocal most
        tensor = init_parameter(*args)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    parallel = setup(ParallelConfig(mode="fsdp"))
    model = parallel.wrap(UNTIED, VOCABULARY, LENGTH)
    GPT.init_parameter = watched
    initialise(model, seed=11)
    here = sum(local(p).numel() for p in model.parameters())
    return {"most": most, "tensors": len(alive), "here": here, "all": sum(p.numel() for p in model.parameters())}


@pytest.mark.slow
def test_no_rank_ever_holds_more_than_one_whole_tensor(tmp_path):
    results = run_workers(initialise_watched, 3, tmp_path)
    for result in results:
        assert result["most"] == 1 and result["tensors"] == len(list(GPT(UNTIED, VOCABULARY, LENGTH).parameters()))
        assert result["here"] < 0.5 * result["all"]
    assert sum(result["here"] for result in results) == results[0]["all"]


# --- recomputation, precision, compilation ---


def options(rank: int, world_size: int, settings: list[dict], dtype: str) -> dict:
    losses = {}
    for mode in ("ddp", "fsdp"):
        for i, setting in enumerate(settings):
            parallel = setup(ParallelConfig(mode=mode, **setting), dtype=dtype, seed=3)
            result = train(parallel, MODELS["untied"])
            assert all(value.dtype == torch.float32 for value in result["weights"].values())
            assert all(value.dtype == torch.float32 for value in result["gradients"].values())
            assert result["weights"].keys() == dict(GPT(UNTIED, VOCABULARY, LENGTH).named_parameters()).keys()
            losses[f"{mode} {i}"] = torch.tensor(result["losses"] + result["norms"])
    return losses


@pytest.mark.slow
def test_recomputation_gives_the_same_losses(tmp_path):
    settings = [{"activation_checkpointing": how} for how in ("none", "full", "selective")]
    losses = run_workers(options, 2, tmp_path, settings=settings, dtype="float32")[0]
    for mode in ("ddp", "fsdp"):
        assert torch.equal(losses[f"{mode} 0"], losses[f"{mode} 1"])
        assert torch.equal(losses[f"{mode} 0"], losses[f"{mode} 2"])


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path, reference):
    expected = torch.tensor(reference["float32 untied"]["losses"])
    for losses in run_workers(options, 2, tmp_path, settings=[{}], dtype="bfloat16")[0].values():
        assert 1e-5 < (losses[:STEPS] / expected - 1).abs().max() < 1e-2


@pytest.mark.slow
@pytest.mark.skipif("NANOMUON_SOAK" not in os.environ, reason="compiles for minutes: make soak runs it")
def test_compilation_gives_the_same_losses(tmp_path):
    settings = [{}, {"compile": True}, {"compile": True, "activation_checkpointing": "full"}]
    losses = run_workers(options, 2, tmp_path, timeout=1800, settings=settings, dtype="float32")[0]
    for mode in ("ddp", "fsdp"):
        for i in (1, 2):
            torch.testing.assert_close(losses[f"{mode} {i}"], losses[f"{mode} 0"], rtol=2e-5, atol=1e-6)


# --- one process ---


@pytest.fixture(scope="module")
def alone() -> Parallel:
    return setup(ParallelConfig(), dtype="float64", seed=5)


def test_one_process_is_single_and_plain(alone):
    model = alone.wrap(TIED, VOCABULARY, LENGTH)
    assert alone.mode == "single" and type(model) is GPT and unwrap(model) is model
    assert alone.is_main and alone.shard_group is None
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, model.init_parameter(name, 5).double())


def test_float32_is_whole_also_after_a_job_in_bfloat16():
    """In a sweep under torchrun, jobs share a process; a GPU would round a later one's products."""
    for dtype, precision in (("bfloat16", "high"), ("float32", "highest")):
        setup(ParallelConfig(), dtype=dtype)
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("max_norm", [0.01, 1e6, None])
def test_clip_equals_torchs(alone, max_norm):
    ours, theirs = (alone.wrap(TIED, VOCABULARY, LENGTH) for _ in range(2))
    for model in (ours, theirs):
        backward(alone, model, 0)
    norm = alone.clip(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or float("inf"))
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_evaluation_builds_no_graph_and_comes_back(alone):
    model = alone.wrap(TIED, VOCABULARY, LENGTH)
    with pytest.raises(RuntimeError, match="stop"), alone.evaluation(model):
        assert not model.training and not model(torch.zeros(1, 2, dtype=torch.int64)).requires_grad
        raise RuntimeError("stop")
    assert model.training and torch.is_grad_enabled()


def test_modules_compile_in_place(monkeypatch):
    """The parts that the model names, each once, without a change of its parameters' names."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    model = setup(ParallelConfig(compile=True)).wrap(UNTIED, VOCABULARY, LENGTH)
    assert compiled == [*model.blocks, model.loss]
    assert list(model.state_dict()) == list(setup(ParallelConfig()).wrap(UNTIED, VOCABULARY, LENGTH).state_dict())
