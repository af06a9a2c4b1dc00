"""A sweep's jobs: their names, their processes, what is said of each."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from common import UserError
from tests.errors import check_names, error_lines, raises_naming
from trainer.launch import cli, processes
from trainer.launch.sweep import JobFailed
from trainer.run import preemption
from trainer.run.directory import acquire_run_dir, identity

SUBMITIT = "hydra_plugins.hydra_submitit_launcher."


def sweep(*overrides):
    return cli.compose_jobs(list(overrides), multirun=True)


def test_sweep_names_the_keys_that_vary():
    found = sweep("experiment=smoke", "optim=adamw,muon", "seed=range(1,3)", "hydra.sweep.dir=runs/both")
    assert (found.swept_keys, found.folder) == (["optim", "seed"], "runs/both")
    assert [config.run.dir for config in found.jobs] == [
        f"runs/both/optim={optim},seed={seed}" for optim in ("adamw", "muon") for seed in (1, 2)
    ]
    assert {config.logger.group for config in found.jobs} == {"both"}
    assert [config.logger.label for config in found.jobs] == ["adamw", "adamw", "muon", "muon"]


def test_abba_turns_the_order_round_from_seed_to_seed():
    words = ["experiment=smoke", "optim=adamw,muon", "seed=1,2,3", "sweep.order=abba", "hydra.sweep.dir=runs/both"]
    found = sweep(*words)
    ran = [(config.optim.name, config.seed) for config in found.jobs]
    assert ran == [("adamw", 1), ("muon", 1), ("muon", 2), ("adamw", 2), ("adamw", 3), ("muon", 3)]
    for i, config in enumerate(found.jobs):
        assert found.names[i] == f"optim={config.optim.name},seed={config.seed}" and config.run.name == found.names[i]
        assert found.composed[i].optim.name == config.optim.name and f"seed={config.seed}" in found.overrides[i]
        assert not any("hydra" in word for word in found.overrides[i])
    listed = sweep(*words[:3], words[4])
    assert identity(found.jobs[2]) == identity(listed.jobs[4]), "the same run, in whatever order"
    with raises_naming(UserError, "sweep.order=abba", "seed=1,2"):
        sweep("experiment=smoke", "optim=adamw,muon", "sweep.order=abba")


def test_an_experiment_may_be_a_sweep():
    found = cli.compose_jobs(["experiment=lecture", "seed=3,4"])
    assert len(found.jobs) == 14 and found.jobs[1].run.name == "optim=sgd,seed=4"
    job = found.jobs[0]
    alone = processes.job_arguments(job, ["experiment=lecture", "optim=sgd", "seed=3"])
    assert cli.compose_jobs(alone) is None, "a job of it is not"


@pytest.mark.parametrize("experiment", ["speedrun_124m", "gpt2_124m_llmc", "nanogpt_124m"])
def test_published_settings(experiment):
    assert cli.compose_jobs([f"experiment={experiment}", "run.processes=8"]) is None


def test_processes_are_known_before_they_start(monkeypatch):
    with raises_naming(UserError, "train.batch_tokens=3072", "7 ranks", "nearest"):
        sweep("experiment=smoke", "run.processes=7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with raises_naming(UserError, "run.processes=3", "2 ", "torchrun"):
        cli.compose_jobs(["experiment=smoke", "run.processes=3"])


def test_slurm_is_asked_only_where_it_is(tmp_path, monkeypatch):
    slurm = SUBMITIT + "submitit_launcher.SlurmLauncher"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "")  # so that it is put back
    monkeypatch.delenv("SUBMITIT_PREEMPT_SIGNAL")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    with raises_naming(UserError, "hydra/launcher=slurm", "srun", "leave"):
        processes.prepare_submitit(slurm)
    (tmp_path / "srun").touch(mode=0o755)
    processes.prepare_submitit(slurm)
    asked = f"SIG{os.environ['SUBMITIT_PREEMPT_SIGNAL']}"
    assert asked in {number.name for number in preemption.SIGNALS}, "a run saves at it"
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(cli.CONFIGS.parent), "/elsewhere"]


def test_a_job_that_slurm_loses_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    lost = type("FailedJobError", (RuntimeError,), {"__module__": "submitit.core.utils"})

    def hydra_main(*_, **__):
        raise lost("Job 42_0 (task: 0) has no result\nits log …")

    found = sweep("experiment=smoke", "seed=1,2", f"hydra.sweep.dir={tmp_path}/lost")
    monkeypatch.setattr(cli, "parse_command_line", lambda: found)
    monkeypatch.setattr(cli.hydra, "main", hydra_main)
    with pytest.raises(SystemExit):
        cli.main(lambda config: None)
    told = capsys.readouterr()
    check_names(told.err, "Job 42_0", f"{tmp_path}/lost/.submitit")
    assert "2 of 2 jobs have not finished" in told.out and "/lost/.submitit/*/*_log" not in told.out
    found.launcher = SUBMITIT + "submitit_launcher.SlurmLauncher"
    found.summary()
    assert "/lost/.submitit/*/*_log" in capsys.readouterr().out


def test_a_job_reads_its_command_line_back(configure, tmp_path):
    config = configure("experiment=smoke", "run.resume=never", "logger.label='a=b, c'")
    config.run.dir = str(tmp_path / "it's, [a] {b} = c\\")
    words = processes.job_arguments(config, ["experiment=smoke", "seed=3", "run.resume=never", "logger.label='a=b, c'"])
    again = configure(*words)
    assert (again.run.dir, again.logger.label, again.seed) == (config.run.dir, "a=b, c", 3)
    assert again.run.resume == "auto", "its directory is claimed when it starts"


def script(tmp_path, monkeypatch, text):
    """In place of train.py."""
    (tmp_path / "script.py").write_text(text)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])


def test_a_job_that_is_killed_is_named(configure, tmp_path, monkeypatch, capfd):
    config = configure("experiment=smoke", "run.processes=2", "run.dir=here", world_size=2)
    what = "os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)"  # the agent ends the other
    script(tmp_path, monkeypatch, f"import os, time; {what}")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(JobFailed):
        processes.launch(config, [])
    [told] = error_lines(capfd.readouterr().err)
    check_names(told, "here", "rank 1", "SIGKILL")
    assert signal.getsignal(signal.SIGTERM) == handler


def test_ctrl_c_ends_the_job_and_the_sweep(configure, tmp_path, monkeypatch):
    config = configure("experiment=smoke")
    mark = tmp_path / "interrupted"
    script(
        tmp_path,
        monkeypatch,
        f"""
import os, pathlib, signal, time
try:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({str(mark)!r}).touch()
""",
    )
    with pytest.raises(SystemExit) as ended:
        processes.launch(config, [])
    assert ended.value.code == 130 and mark.exists()


def finish(config, **values):
    """As if the job had run."""
    acquire_run_dir(config)
    line = {"step": config.train.steps, "tokens": 1, "train_time_s": 61.0, "val/loss": 2.5, **values}
    (Path(config.run.dir) / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_summary_is_read_from_the_records(tmp_path, capsys):
    found = sweep("experiment=smoke", "optim=adamw,muon", "seed=1,2", f"hydra.sweep.dir={tmp_path}/my sweep")
    one, two, three, _ = found.jobs
    finish(one)
    found.start()
    finish(two)
    finish(three, step=7)
    found.statuses = {1: "stopped", 2: "failed"}
    assert found.summary() is False
    text = capsys.readouterr().out
    assert all(word in text for word in ("4 jobs", "1 of them finished", f"hydra.sweep.dir='{tmp_path}/my sweep'"))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("optim=")}
    assert rows["optim=adamw,seed=1"] == ["finished", "before", "400", "2.5000", "1:01"]
    assert rows["optim=adamw,seed=2"] == ["finished", "400", "2.5000", "1:01"]
    assert rows["optim=muon,seed=1"] == ["failed", "7", "2.5000", "1:01"]
    assert rows["optim=muon,seed=2"] == ["not", "started", "0", "-", "0.0", "s"]
    assert f"python scripts/compare.py '{tmp_path}/my sweep' --out '{tmp_path}/my sweep/speedrun'" in text
    assert "2 of 4 jobs have not finished" in text
    name, found.names[3] = found.names[3], "long," * 30
    found.summary()
    assert "long," * 30 in capsys.readouterr().out, "a name is never cut"
    found.names[3] = name
    finish(three)
    finish(found.jobs[3])
    assert found.summary() is True and "--baseline adamw" in capsys.readouterr().out


def test_a_sweep_has_jobs_and_is_not_over_hydra_s_own_keys():
    """Nothing ran, with exit code 0."""
    with raises_naming(UserError, "seed=range(3,1)", "no job"):
        sweep("experiment=smoke", "seed=range(3,1)")
    with raises_naming(UserError, "hydra.sweep.dir", "one value"):
        sweep("experiment=smoke", "hydra.sweep.dir=a,b")


def test_every_job_of_a_sweep_is_checked_first():
    with raises_naming(UserError, "train.batch_tokens=3000", "2944 or 3072"):
        sweep("experiment=smoke", "train.batch_tokens=3072,3000")
    with raises_naming(UserError, "optim=muonn", "did you mean optim=muon?"):
        sweep("experiment=smoke", "optim=adamw,muonn")
    with raises_naming(UserError, "optim.embedding.betas=", "optim.embedding.betas.FAMILY"):
        sweep("experiment=smoke", "optim=muon", "optim.embedding.betas=[0.9,0.99]")


def test_jobs_of_a_sweep_cannot_share_a_directory(tmp_path):
    with raises_naming(UserError, f"run.dir={tmp_path}", "hydra.sweep.dir"):
        sweep("experiment=smoke", "seed=1,2", f"run.dir={tmp_path}")
    for values, mend in {"logger.label=x_b,x/b": "two sweeps", "optim.matrix.lr=0.1,0.10": "once"}.items():
        with raises_naming(UserError, f"{values.partition('=')[0]}=", mend):
            sweep("experiment=smoke", values)


def test_a_terminal_without_unicode_shows_the_summary(tmp_path, monkeypatch):
    found = sweep("experiment=smoke", "logger.label='α','β'", f"hydra.sweep.dir={tmp_path}")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(cli, "parse_command_line", lambda: found)
    monkeypatch.setattr(cli.hydra, "main", lambda *_, **__: lambda task: lambda: None)
    with pytest.raises(SystemExit):
        cli.main(lambda config: None)
    terminal.flush()
    assert "logger.label=_?_" in terminal.buffer.getvalue().decode("latin-1")
