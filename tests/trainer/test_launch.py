"""From the command line to the run's directory: sweeps, ownership, errors told once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import DataError
from data.shards import write_shard
from trainer import faults, launch, processes, rundir, schema
from trainer.schema import ConfigError
from trainer.sweep import JobFailed

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["experiment=smoke", "train.steps=2", "eval.every=2", "eval.tokens=3072", "logger=jsonl", "model.n_layer=1"]


def sweep(*overrides):
    schema.register()
    return launch.check_jobs(list(overrides), SimpleNamespace(multirun=True))


def test_sweep_names_the_keys_that_vary():
    found = sweep("experiment=smoke", "optim=adamw,muon", "seed=range(1,3)", "hydra.sweep.dir=runs/both")
    assert (found.varying, found.folder) == (["optim", "seed"], "runs/both")
    assert [config.run.dir for config in found.jobs] == [
        f"runs/both/optim={optim},seed={seed}" for optim in ("adamw", "muon") for seed in (1, 2)
    ]
    assert {config.logger.group for config in found.jobs} == {"both"}
    assert [config.logger.label for config in found.jobs] == ["adamw", "adamw", "muon", "muon"]


def test_an_experiment_may_be_a_sweep():
    schema.register()
    found = launch.check_jobs(["experiment=lecture", "seed=3,4"], SimpleNamespace(multirun=False))
    assert len(found.jobs) == 14 and found.jobs[1].run.name == "optim=sgd,seed=4"
    job = found.jobs[0]
    alone = processes.arguments(job, ["experiment=lecture", "optim=sgd", "seed=3"])
    assert launch.check_jobs(alone, SimpleNamespace(multirun=False)) is None, "a job of it is not"


@pytest.mark.parametrize("experiment", ["speedrun_124m", "gpt2_124m_llmc"])
def test_published_settings(experiment):
    schema.register()
    assert launch.check_jobs([f"experiment={experiment}", "run.processes=8"], SimpleNamespace(multirun=False)) is None


def test_processes_are_known_before_they_start(monkeypatch):
    with pytest.raises(ConfigError, match="which 7 ranks cannot share"):
        sweep("experiment=smoke", "run.processes=7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="run.processes=3, but 2 were started"):
        launch.check_jobs(["experiment=smoke", "run.processes=3"], SimpleNamespace(multirun=False))


def test_slurm_is_asked_only_where_it_is(tmp_path, monkeypatch):
    slurm = launch.SUBMITIT + "submitit_launcher.SlurmLauncher"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "")  # so that it is put back
    monkeypatch.delenv("SUBMITIT_PREEMPT_SIGNAL")
    with pytest.raises(ConfigError, match="hydra/launcher=slurm: no srun on this machine"):
        processes.prepare_submitit(slurm)
    (tmp_path / "srun").touch(mode=0o755)
    processes.prepare_submitit(slurm)
    asked = f"SIG{os.environ['SUBMITIT_PREEMPT_SIGNAL']}"
    assert asked in {number.name for number in faults.SIGNALS}, "a run saves at it"


def test_a_job_that_slurm_loses_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    lost = type("FailedJobError", (RuntimeError,), {"__module__": "submitit.core.utils"})

    def hydra_main(*_, **__):
        raise lost("Job 42_0 (task: 0) has no result\nits log …")

    found = sweep("experiment=smoke", "seed=1,2", f"hydra.sweep.dir={tmp_path}/lost")
    monkeypatch.setattr(launch, "prepare", lambda: found)
    monkeypatch.setattr(launch.hydra, "main", hydra_main)
    with pytest.raises(SystemExit):
        launch.main(lambda config: None)
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1 and "Job 42_0" in told.err and f"{tmp_path}/lost/.submitit" in told.err
    assert "2 of 2 jobs have not finished" in told.out and "/lost/.submitit/*/*_log" not in told.out
    found.launcher = launch.SUBMITIT + "submitit_launcher.SlurmLauncher"
    found.summary()
    assert "/lost/.submitit/*/*_log" in capsys.readouterr().out


def test_a_job_reads_its_command_line_back(configure, tmp_path):
    config = configure("experiment=smoke", "run.resume=never", "logger.label='a=b, c'")
    config.run.dir = str(tmp_path / "it's, [a] {b} = c\\")
    words = processes.arguments(config, ["experiment=smoke", "seed=3", "run.resume=never", "logger.label='a=b, c'"])
    again = configure(*words)
    assert (again.run.dir, again.logger.label, again.seed) == (config.run.dir, "a=b, c", 3)
    assert again.run.resume == "auto", "its directory is claimed when it starts"


def script(tmp_path, monkeypatch, text):
    """In place of train.py."""
    (tmp_path / "script.py").write_text(text)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])


def test_a_job_that_is_killed_is_named(configure, tmp_path, monkeypatch, capfd):
    config = configure("experiment=smoke", "run.processes=2", "run.dir=here", world_size=2)
    script(tmp_path, monkeypatch, "import os; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(JobFailed):
        processes.start(config, [])
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]  # torch may warn too
    assert told == ["error: here: rank 1 was ended by SIGKILL"]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_ctrl_c_ends_the_job_and_the_sweep(configure, tmp_path, monkeypatch):
    config = configure("experiment=smoke")
    mark = tmp_path / "interrupted"
    script(tmp_path, monkeypatch, f"""
import os, pathlib, signal, time
try:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({str(mark)!r}).touch()
""")
    with pytest.raises(SystemExit) as ended:
        processes.start(config, [])
    assert ended.value.code == 130 and mark.exists()


def finish(config, **values):
    """As if the job had run."""
    rundir.claim(config)
    line = {"step": config.train.steps, "tokens": 1, "train_time_s": 61.0, "val/loss": 2.5, **values}
    (Path(config.run.dir) / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_summary_is_read_from_the_records(tmp_path, capsys):
    found = sweep("experiment=smoke", "optim=adamw,muon", "seed=1,2", f"hydra.sweep.dir={tmp_path}/my sweep")
    one, two, three, _ = found.jobs
    finish(one)
    found.begin()
    finish(two)
    finish(three, step=7)
    found.states = {two.run.dir: "stopped", three.run.dir: "failed"}
    assert found.summary() is False
    text = capsys.readouterr().out
    assert "4 jobs, 1 of them finished; to start again: the same command with hydra.sweep.dir='" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("optim=")}
    assert rows["optim=adamw,seed=1"] == ["finished", "before", "400", "2.5000", "1:01"]
    assert rows["optim=adamw,seed=2"] == ["finished", "400", "2.5000", "1:01"]
    assert rows["optim=muon,seed=1"] == ["failed", "7", "2.5000", "1:01"]
    assert rows["optim=muon,seed=2"] == ["not", "started", "0", "–", "0.0", "s"]
    assert f"python scripts/compare.py '{tmp_path}/my sweep' --out '{tmp_path}/my sweep/speedrun'" in text
    assert "2 of 4 jobs have not finished" in text
    found.jobs[3].run.dir = f"{tmp_path}/my sweep/{'long,' * 30}"
    found.summary()
    assert "long," * 30 in capsys.readouterr().out, "a name is never cut"
    found.jobs[3].run.dir = f"{tmp_path}/my sweep/optim=muon,seed=2"
    finish(three)
    finish(found.jobs[3])
    assert found.summary() is True and "--baseline adamw" in capsys.readouterr().out


def test_every_job_of_a_sweep_is_checked_first():
    with pytest.raises(ConfigError, match=r"train.batch_tokens=3000"):
        sweep("experiment=smoke", "train.batch_tokens=3072,3000")
    with pytest.raises(ConfigError, match=r"optim=muonn.*did you mean optim=muon"):
        sweep("experiment=smoke", "optim=adamw,muonn")


def test_jobs_of_a_sweep_cannot_share_a_directory(tmp_path):
    with pytest.raises(ConfigError, match="hydra.sweep.dir"):
        sweep("experiment=smoke", "seed=1,2", f"run.dir={tmp_path}")


def test_job_names_are_readable_unique_and_short():
    assert rundir.job_name(["optim=muon", "seed=3"], 3) == "optim=muon,seed=3"
    assert rundir.job_name(["++optim.matrix.lr=0.01"], 0) == "optim.matrix.lr=0.01,seed=0"
    assert rundir.job_name(["data.dir=/a/b"], 0) == "data.dir=_a_b,seed=0"
    long = [rundir.job_name([f"data.dir={'x' * 300}{n}"], 0) for n in range(2)]
    assert long[0] != long[1] and max(map(len, long)) < 200


def test_default_directories_never_collide(configure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure("experiment=smoke")
    directories = [rundir.claim(config) for _ in range(3)]
    assert len(set(directories)) == 3 and all("muon-tiny-sample-s0" in name for name in directories)


def test_a_directory_belongs_to_one_run(configure, tmp_path):
    base = ["experiment=smoke", f"run.dir={tmp_path}/run"]
    rundir.claim(configure(*base))
    before = (tmp_path / "run" / "run.json").read_text()
    for change, key in (
        ("seed=1", "seed is 0 there and 1 here"),
        ("optim.matrix.lr=0.5", r"optim.matrix.lr is 0.\d+ there and 0.5 here"),
        ("train.steps=300", "train.steps is 400 there and 300 here"),
        ("model.n_layer=2", "model.n_layer is 4 there and 2 here"),
    ):
        with pytest.raises(ConfigError, match=f"belongs to another run: {key}"):
            rundir.claim(configure(*base, change))
    with pytest.raises(ConfigError, match="and .* more"):
        rundir.claim(configure(*base, "optim=adamw"))
    assert (tmp_path / "run" / "run.json").read_text() == before


@pytest.mark.parametrize("change", ["logger=jsonl", "eval.every=7", "checkpoint.every=5", "train.micro_batch=2"])
def test_what_does_not_change_the_training_is_accepted(configure, tmp_path, change):
    base = ["experiment=smoke", f"run.dir={tmp_path}/run"]
    rundir.claim(configure(*base))
    assert rundir.claim(configure(*base, change)) == f"{tmp_path}/run"


def test_what_may_differ_is_in_the_schema():
    assert set(rundir.FREE) <= set(schema.keys())


def test_another_number_of_ranks_is_the_same_run(configure, tmp_path):
    base = ["experiment=smoke", f"run.dir={tmp_path}/run"]
    rundir.claim(configure(*base))
    rundir.claim(configure(*base, "parallel=hsdp", world_size=4))


@pytest.mark.parametrize("fault", ["a header that is none", "less than a batch"])
def test_data_that_cannot_be_trained_on_takes_no_directory(configure, tmp_path, fault):
    shards = [tmp_path / "data" / f"it_{part}_000000.bin" for part in ("train", "val")]
    shards[0].parent.mkdir()
    for shard in shards:
        write_shard(shard, range(200))
    if fault == "a header that is none":
        shards[0].write_bytes(bytes(3000))
    config = configure("experiment=smoke", "data=shards", f"data.dir={tmp_path}/data", f"run.dir={tmp_path}/run")
    with pytest.raises(DataError, match="magic 0" if fault == "a header that is none" else "less than one batch"):
        launch.settle(config)
    assert not (tmp_path / "run").exists()


def test_resume_never_and_must(configure, tmp_path):
    base = ["experiment=smoke", f"run.dir={tmp_path}/run"]
    with pytest.raises(ConfigError, match="holds no run"):
        rundir.claim(configure(*base, "run.resume=must"))
    assert not (tmp_path / "run").exists()
    rundir.claim(configure(*base, "run.resume=never"))
    rundir.claim(configure(*base, "run.resume=must"))
    with pytest.raises(ConfigError, match="run.resume=never"):
        rundir.claim(configure(*base, "run.resume=never"))


def test_foreign_and_damaged_directories_are_refused(configure, tmp_path):
    config = configure("experiment=smoke", f"run.dir={tmp_path}/run")
    (tmp_path / "run").mkdir()
    rundir.claim(config)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="run.json is damaged"):
        rundir.claim(config)
    (tmp_path / "run" / "run.json").rename(tmp_path / "run" / "thesis.tex")
    with pytest.raises(ConfigError, match="not a run's"):
        rundir.claim(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_atomic_writing_leaves_no_half_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    rundir.write_atomically(target, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        rundir.write_atomically(target, "new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def train(*arguments, ranks=0, cwd, timeout=200):
    """train.py as a user starts it, in the folder ``cwd``; ``ranks`` > 0: under torchrun."""
    start = (
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks else [sys.executable]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*start, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


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
    assert done.returncode == 1 and errors(done) == ["error: train.stepz=3: no such key; did you mean train.steps?"]
    assert not list(tmp_path.iterdir())
    if not ranks:
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_foreign_directory_is_refused_on_all_ranks(tmp_path):
    (tmp_path / "mine").write_text("")
    done = train(*SMALL, f"run.dir={tmp_path}", ranks=2, cwd=tmp_path)
    assert done.returncode == 1 and len(errors(done)) == 1 and [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_ranks_agree_on_one_timestamped_directory(tmp_path):
    done = train(*SMALL, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["runs"] and len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.slow
def test_processes_without_a_launcher_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = train(*SMALL, cwd=tmp_path)
    assert done.returncode == 1 and len(errors(done)) == 1 and "torchrun" in errors(done)[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_download_that_fails_is_told_once_by_all_ranks(tmp_path):
    done = train(*SMALL, "data=fineweb", "data.download=true", f"data.dir={tmp_path}/none", ranks=2, cwd=tmp_path)
    assert done.returncode == 1 and len(errors(done)) == 1 and "Hugging Face hub" in errors(done)[0]
    assert "trainer/loop.py" not in done.stderr, "no rank's trace"
