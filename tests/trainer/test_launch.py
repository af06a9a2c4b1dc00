"""From the command line to the run's directory: ownership, errors told once."""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import hydra
import pytest
import torch.distributed as dist
from hydra.core.global_hydra import GlobalHydra
from hydra.version import getbase

from common import UserError, write_text
from data.shards import write_shard
from tests.distributed.programs import train
from tests.errors import check_names, error_lines, raises_naming
from tests.runs import ROOT, TINY
from trainer.config import keys
from trainer.launch import failures, load_config, processes, rendezvous
from trainer.launch.job import prepare_run_dir
from trainer.run.directory import NOT_IDENTITY, acquire_run_dir, job_name

SMALL = [*TINY, "train.steps=2", "eval.every=2"]


# Composition -----------------------------------------------------------------------------------------------------


def test_load_config_works_anywhere_and_leaves_hydra_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.yaml").write_text("answer: 42")
    assert load_config().model.name == "gpt2_124m" and not GlobalHydra.instance().is_initialized()
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        before = GlobalHydra.instance(), GlobalHydra.instance().hydra, getbase()
        for _ in range(2):
            config = load_config(["experiment=smoke", "run.from=a", "optim.matrix.cautious=true"], world_size=2)
            assert (config.run.from_, config.optim.matrix["cautious"]) == ("a", True)
            with raises_naming(UserError, "experiment=smokee", "did you mean experiment=smoke?"):
                load_config(["experiment=smokee"])
        assert (GlobalHydra.instance(), GlobalHydra.instance().hydra, getbase()) == before
        assert hydra.compose("theirs").answer == 42
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.yaml"]
    assert "hydra" not in subprocess.run(
        [sys.executable, "-c", "import sys; from trainer.launch import load_config; print(*sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip


@pytest.mark.parametrize(
    ("override", "words"),
    {
        "optim.vector.lr=1": ["optim.scalar.lr"],
        "+optim.vector.lr=1": ["optim.scalar.lr"],
        "hydra.run.dir=X": ["called run.dir"],
        "run.extend=true": ["called run.from"],
        "logger=null": ["choose one of jsonl, wandb"],
        "logger=true": ["logger=true", "jsonl, wandb"],
        "model=3": ["model=3", "tiny"],
        "parallel=[0.9,0.95]": ["choose one of", "fsdp"],
        "run.name=${hydra:runtime.choices.optim}": ["the value itself"],
        "seed=-1": ["from 0"],
        "~train": ["give it another value"],
        "hydra.sweeper.params.seed='1,2'": ["cannot compose"],
        "seed=4294967296": ["4294967295"],
    }.items(),
)
def test_what_strangers_type_is_told_in_one_line(override, words):
    with raises_naming(UserError, override, *words):
        load_config(["experiment=smoke", override])


@pytest.mark.parametrize(
    ("pattern", "words"),
    {"*.attn.oo.weight": ["blocks.0.attn.o.weight"], "*.q.*": ["write it before"], "lm_head.*": ["blocks."]}.items(),
)
def test_a_name_that_no_parameter_has_is_told_with_near_ones(pattern, words):
    own = f"optim.matrix.by_name={{*.attn.q.weight: {{momentum: 0.5}}, {pattern}: {{momentum: 0.6}}}}"
    with raises_naming(UserError, "optim.matrix.by_name", pattern, *words):
        load_config(["experiment=smoke", own])


@pytest.mark.parametrize(
    ("own", "words"),
    {
        "split: 3": ["split=3", "blocks.0.attn.q.weight", "fan-out of 128"],
        "split: [64,32]": ["split=(64, 32)", "128"],
        "head_dim: 32, split: 2": ["head_dim=32"],
        "split: abc": ["split=abc", "whole number"],
        "splitt: 2": ["splitt", "split"],
        "step: 2": ["no setting step"],
        "dtype: bfloat16": ["dtype", "of a group"],
    }.items(),
)
def test_by_name_says_how_a_parameter_is_cut_as_a_group_does(own, words):
    with raises_naming(UserError, "optim.matrix", *words):
        load_config(["experiment=smoke", "optim=muon", f"optim.matrix.by_name={{*.attn.q.weight: {{{own}}}}}"])


@pytest.mark.parametrize("name", ["schedule_free", "soap_muon_46"])
def test_the_larger_tracks_own_presets_are_of_its_model_and_length(name):
    """A null in the place of a preset's names takes them away: the record's are of biases, which this model has not."""
    plain, own = load_config(["experiment=cpu_large"]), load_config(["experiment=cpu_large", f"optim=large/{name}"])
    assert (own.model, own.train, own.schedule.horizon) == (plain.model, plain.train, None)
    assert not (own.optim.scalar.get("by_name") or {})


def test_overrides_are_a_list():
    with raises_naming(UserError, "['experiment=smoke']"):
        load_config("experiment=smoke")


@pytest.mark.parametrize("file", ["experiment/mine.yaml", "optim/mine.yaml"])
def test_a_key_of_before_in_a_users_own_file_names_the_new_one(tmp_path, file):
    (tmp_path / file).parent.mkdir()
    text = "vector: {lr: 1}\n"
    (tmp_path / file).write_text(text if "optim" in file else f"# @package _global_\noptim:\n  {text}")
    with raises_naming(UserError, "optim.vector", "optim.scalar"):
        load_config([f"hydra.searchpath=[{tmp_path}]", f"{file.partition('/')[0]}=mine", "data=sample"])


def test_home_and_no_experiment_can_be_typed(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(["experiment=null", "run.dir=~/runs/a", "run.from=~/b", "data=sample"])
    assert (config.run.dir, config.run.from_, config.model.name) == ("/home/me/runs/a", "/home/me/b", "gpt2_124m")


# Processes -------------------------------------------------------------------------------------------------------


def test_a_rank_left_in_the_environment_is_one_process(monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)
    assert not processes.is_launched() and rendezvous.broadcast_rank0("key", lambda: "value") == "value"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert processes.is_launched(), "torchrun with one process"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("holder", ["a program", "a store"])
def test_a_port_that_another_program_holds_is_told_at_once(monkeypatch, rank, holder):
    with socket.socket() as program:
        program.bind(("127.0.0.1", 0))
        program.listen()
        other = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = other.port if holder == "a store" else program.getsockname()[1]
        address = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        address["MASTER_PORT"] = str(port)
        for key, value in address.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(rendezvous, "HELLO_TIMEOUT", timedelta(seconds=0.5))
        rendezvous.store.cache_clear()
        with raises_naming(rendezvous.RendezvousError, f"MASTER_PORT={port}", "a free port"):
            rendezvous.broadcast_rank0("key", lambda: "value")


def test_ranks_that_do_not_answer_are_named(monkeypatch):
    answers = dist.HashStore()
    answers.set("alive 0 2", "")
    monkeypatch.setattr(failures, "world_size", lambda: 4)
    monkeypatch.setattr(failures, "store", lambda: answers)
    with raises_naming(UserError, "ranks 1, 3 of 4", "same run.dir"), failures.report_failed_ranks(wait=0.2):
        raise RuntimeError("[gloo] Connection closed by peer")
    with pytest.raises(RuntimeError, match="shape"), failures.report_failed_ranks(wait=0.2):
        raise RuntimeError("shape")


# The run's directory ---------------------------------------------------------------------------------------------


def test_job_names_are_readable_unique_and_short():
    assert job_name(["optim=muon", "seed=3"], 3) == "optim=muon,seed=3"
    assert job_name(["++optim.matrix.lr=0.01"], 0) == "optim.matrix.lr=0.01,seed=0"
    assert job_name(["data.dir=/a/b"], 0) == "data.dir=_a_b,seed=0"
    long = [job_name([f"data.dir={'x' * 300}{n}"], 0) for n in range(2)]
    assert long[0] != long[1] and max(map(len, long)) < 200


def test_default_directories_never_collide(configure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure("experiment=smoke")
    directories = [acquire_run_dir(config) for _ in range(3)]
    assert len(set(directories)) == 3 and all("muon-tiny-sample-s0" in name for name in directories)


def test_a_directory_belongs_to_one_run(configure, tmp_path):
    base = ["experiment=smoke", f"run.dir={tmp_path}/run"]
    acquire_run_dir(configure(*base))
    before = (tmp_path / "run" / "run.json").read_text()
    for change, before_value in (
        ("seed=1", "0"),
        ("optim.matrix.lr=0.5", "0."),
        ("train.steps=300", "400"),
        ("model.n_layer=2", "4"),
    ):
        with raises_naming(UserError, f"run.dir={tmp_path}/run", *change.split("="), before_value, "new run.dir"):
            acquire_run_dir(configure(*base, change))
    with raises_naming(UserError, f"run.dir={tmp_path}/run", "more", "new run.dir"):
        acquire_run_dir(configure(*base, "optim=adamw"))
    assert (tmp_path / "run" / "run.json").read_text() == before


@pytest.mark.parametrize("change", ["logger=jsonl", "eval.every=7", "checkpoint.every=5", "train.micro_batch=2"])
def test_what_does_not_change_the_training_is_accepted(configure, tmp_path, change):
    base = ["experiment=smoke", f"run.dir={tmp_path}/run"]
    acquire_run_dir(configure(*base))
    assert acquire_run_dir(configure(*base, change)) == f"{tmp_path}/run"


def test_what_may_differ_is_in_the_schema():
    assert set(NOT_IDENTITY) <= set(keys())


def test_another_number_of_ranks_is_the_same_run(configure, tmp_path):
    base = ["experiment=smoke", f"run.dir={tmp_path}/run"]
    acquire_run_dir(configure(*base))
    acquire_run_dir(configure(*base, "parallel=hsdp", world_size=4))


@pytest.mark.parametrize("fault", ["a header that is none", "less than a batch"])
def test_data_that_cannot_be_trained_on_takes_no_directory(configure, tmp_path, fault):
    shards = [tmp_path / "data" / f"it_{part}_000000.bin" for part in ("train", "val")]
    shards[0].parent.mkdir()
    for first, shard in enumerate(shards):
        write_shard(shard, range(first, first + 200))
    if fault == "a header that is none":
        shards[0].write_bytes(bytes(3000))
    config = configure("experiment=smoke", "data=shards", f"data.dir={tmp_path}/data", f"run.dir={tmp_path}/run")
    words = [str(shards[0]), "magic 0"] if fault == "a header that is none" else ["200 tokens", "train.batch_tokens"]
    with raises_naming(UserError, *words):
        prepare_run_dir(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("run.init=hf:{}", "holds no model.safetensors"),
        ("run.from={}", "holds no checkpoint"),
        ("run.from={}@3", "no checkpoint of update 3"),
        ("eval.tasks=[{}]", "lm"),  # has no such task, or is not installed
    ],
)
def test_what_a_run_begins_with_is_looked_for_before_it_takes_a_directory(configure, tmp_path, word, said):
    word = word.format("nowhere" if "tasks" in word else tmp_path / "nowhere")
    config = configure("experiment=smoke", "logger=jsonl", f"run.dir={tmp_path}/run", word)
    with raises_naming(UserError, "nowhere", said):
        prepare_run_dir(config)
    assert not (tmp_path / "run").exists()


def test_resume_never_and_must(configure, tmp_path):
    base = ["experiment=smoke", f"run.dir={tmp_path}/run"]
    with raises_naming(UserError, "run.resume=must", f"run.dir={tmp_path}/run", "a started run"):
        acquire_run_dir(configure(*base, "run.resume=must"))
    assert not (tmp_path / "run").exists()
    acquire_run_dir(configure(*base, "run.resume=never"))
    acquire_run_dir(configure(*base, "run.resume=must"))
    with raises_naming(UserError, "run.resume=never", f"run.dir={tmp_path}/run", "new run.dir"):
        acquire_run_dir(configure(*base, "run.resume=never"))


def test_a_longer_run_is_told_how_to_go_on(configure, tmp_path):
    base = ["experiment=smoke", f"run.dir={tmp_path}/run"]
    acquire_run_dir(configure(*base))
    with raises_naming(UserError, "train.steps is 400 there and 800 here", f"run.from={tmp_path}/run", "new run.dir"):
        acquire_run_dir(configure(*base, "train.steps=800"))
    with pytest.raises(UserError) as error:
        acquire_run_dir(configure(*base, "train.steps=800", "seed=9"))
    assert "run.from" not in str(error.value)


def test_foreign_and_damaged_directories_are_refused(configure, tmp_path):
    config = configure("experiment=smoke", f"run.dir={tmp_path}/run")
    (tmp_path / "run").mkdir()
    acquire_run_dir(config)
    (tmp_path / "run" / "run.json").write_text("{")
    with raises_naming(UserError, f"{tmp_path}/run/run.json", "damaged", "new run.dir"):
        acquire_run_dir(config)
    (tmp_path / "run" / "run.json").rename(tmp_path / "run" / "thesis.tex")
    with raises_naming(UserError, f"run.dir={tmp_path}/run", "empty or new folder"):
        acquire_run_dir(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_atomic_writing_leaves_no_half_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_text(target, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        write_text(target, "new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


# As a user starts it ---------------------------------------------------------------------------------------------


def check_told_once(done, *words):
    """It has ended with one error, however many ranks there were."""
    assert done.returncode == 1 and len(error_lines(done.stderr)) == 1, done.stderr
    check_names(error_lines(done.stderr)[0], *words)


@pytest.mark.slow
def test_help_lists_groups_and_keys(tmp_path):
    done = train("--help", cwd=tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    for word in ("optim: ", "muon", "experiment: ", "train.steps=", "run.dir=", "eval.tokens=", "torchrun"):
        assert word in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 3])
def test_a_mistake_is_told_once_and_leaves_nothing(tmp_path, ranks):
    done = train("experiment=smoke", "train.stepz=3", ranks=ranks, cwd=tmp_path)
    check_told_once(done, "train.stepz=3", "train.steps?")
    assert not list(tmp_path.iterdir())
    if not ranks:
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_foreign_directory_is_refused_on_all_ranks(tmp_path):
    (tmp_path / "mine").write_text("")
    done = train(*SMALL, f"run.dir={tmp_path}", ranks=2, cwd=tmp_path)
    check_told_once(done, f"run.dir={tmp_path}", "empty or new folder")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_ranks_agree_on_one_timestamped_directory(tmp_path):
    done = train(*SMALL, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["runs"] and len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.slow
def test_processes_without_a_launcher_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = train(*SMALL, cwd=tmp_path)
    check_told_once(done, "WORLD_SIZE=2", "RANK", "torchrun")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_download_that_fails_is_told_once_by_all_ranks(tmp_path):
    done = train(*SMALL, "data=fineweb", "data.download=true", f"data.dir={tmp_path}/none", ranks=2, cwd=tmp_path)
    check_told_once(done, "kjj0/fineweb10B-gpt2", "Hugging Face hub", "data=local")
    assert "trainer/loop.py" not in done.stderr, "no rank's trace"
