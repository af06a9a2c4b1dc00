"""The W&B run: what an offline one holds, and what its summary says."""

import io
import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import wandb
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.trainer.test_record import processes
from tests.wandb_files import read_offline_run
from trainer.metrics.console import Display
from trainer.metrics.record import Metrics
from trainer.metrics.summary import summary
from trainer.metrics.wandb import start, wandb_mode
from trainer.run.directory import acquire_run_dir, run_id


def curve(*points):
    """Lines of evaluations at (step, loss): 100 tokens and half a second a step."""
    return [{"step": s, "tokens": 100 * s, "train_time_s": s / 2, "val/loss": loss} for s, loss in points]


def test_summary():
    lines = [*curve((0, 6.0), (10, 4.0)), {"step": 15, "train/loss": 1.0}, *curve((20, 3.0), (30, 3.5))]
    found = summary(lines, target=3.25)
    assert [found[f"final/{key}"] for key in ("val_loss", "steps", "tokens", "seconds")] == [3.5, 30, 3000, 15.0]
    assert [found[f"target/{key}"] for key in ("loss", "steps", "tokens", "seconds")] == [3.25, 17.5, 1750, 8.75]
    assert [found[f"target/evaluated_{key}"] for key in ("steps", "tokens", "seconds")] == [20, 2000, 10.0]
    for target in (None, 2.9):
        assert not any(key.startswith("target/") for key in summary(lines, target))
    assert summary(lines, target=6.5)["target/steps"] == 0, "below from the start"
    assert summary(curve((0, None)), 1.0) == {} and summary([], 1.0) == {}


@given(
    st.lists(st.floats(1, 10), min_size=2, max_size=8),
    st.floats(1, 10),
)
def test_the_target_is_met_between_two_evaluations(losses, target):
    found = summary(curve(*((10 * i, loss) for i, loss in enumerate(losses))), target)
    assert ("target/steps" in found) == (min(losses) <= target)
    if "target/steps" in found:
        at, after = found["target/steps"], found["target/evaluated_steps"]
        assert max(after - 10, 0) <= at <= after and found["target/seconds"] == pytest.approx(at / 2)


def test_offline_wandb(configure, tmp_path):
    shown = io.StringIO()
    config = configure("experiment=smoke", "logger=wandb", "train.steps=2", f"run.dir={tmp_path}", "logger.tags=[mine]",
                       "logger.group=sweep", "eval.target=5")  # fmt: skip
    acquire_run_dir(config)
    accelerator, display = Accelerator(cpu=True), Display(2, Console(file=shown, width=200))
    record = Metrics(config, processes(accelerator=accelerator), run_id(tmp_path), display=display)
    record.start()
    record.add(1, {"val/loss": 4.25})
    record.write(1, 0.5)
    record.finish()
    accelerator.end_training()
    assert "warning" not in shown.getvalue(), shown.getvalue()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    entries = read_offline_run(path)
    (run,) = [entry.run for entry in entries if entry.WhichOneof("record_type") == "run"]
    axes = {entry.metric.name: entry.metric.step_metric for entry in entries if entry.HasField("metric")}
    history = [entry.history.item for entry in entries if entry.HasField("history")]
    points = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items} for items in history
    ]
    assert (run.project, run.display_name, run.run_group) == ("nanomuon", config.run.name, "sweep")
    updates = [item for entry in entries if entry.HasField("summary") for item in entry.summary.update]
    told = {item.key or "/".join(item.nested_key): item.value_json for item in updates}
    assert [float(told[key]) for key in ("final/val_loss", "target/evaluated_steps")] == [4.25, 1]
    assert "reached after 1 steps" in shown.getvalue()
    assert run.run_id == run_id(tmp_path), "that of run.json, whose ids are drawn anew for every directory"
    assert set(run.tags) == {"muon", "tiny", "sample", "mine"}
    assert axes["val/loss"] == "train_time_s"
    (point,) = [point for point in points if "val/loss" in point]
    assert (point["val/loss"], point["train_time_s"], point["tokens"]) == (4.25, 0.5, 3072)
    assert "offline" in shown.getvalue() and "WARNING" not in shown.getvalue()


@pytest.fixture
def unset(monkeypatch, tmp_path):
    proxies = [name for name in os.environ if name.lower().endswith("_proxy")]
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", *proxies):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


@pytest.fixture
def server():
    """Answers every request with 404."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as served:
        Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_wandb_is_offline_without_a_key(unset, server, tmp_path):
    unset.setenv("WANDB_BASE_URL", server)
    assert wandb_mode() == ("offline", " (no key)")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password x\n")
    assert wandb_mode() == (None, "")
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password x\n")
    assert wandb_mode()[0] == "offline"
    unset.setenv("WANDB_API_KEY", "x")
    assert wandb_mode()[0] is None
    unset.delenv("WANDB_API_KEY")
    unset.setenv("WANDB_API_KEY", " x\n")
    assert wandb_mode()[0] is None and os.environ["WANDB_API_KEY"] == "x"
    for name in ("WANDB_MODE", "WANDB_INIT_TIMEOUT"):
        unset.setenv(name, " ")
    assert wandb_mode()[0] is None and not {"WANDB_MODE", "WANDB_INIT_TIMEOUT"} & os.environ.keys()
    unset.setenv("WANDB_MODE", "disabled")
    assert wandb_mode()[0] is None
    unset.setenv("WANDB_MODE", "hello")
    mode, why = wandb_mode()
    assert mode == "offline" and "WANDB_MODE=hello" in why and "online, offline" in why


def test_wandb_out_of_reach_is_offline_at_once(unset, server, tmp_path):
    unset.setenv("WANDB_API_KEY", "x")
    for url in ("http://127.0.0.1:1", "http://nowhere.invalid", "no address"):
        unset.setenv("WANDB_BASE_URL", url)
        mode, why = wandb_mode()
        assert mode == "offline" and url in why
    assert "WANDB_BASE_URL" not in os.environ, "W&B would not begin a run with that, wherever it is kept"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("WANDB_API_KEY", "short", "key"),
        ("WANDB_MODE", "online", "key"),
        ("WANDB_PROJECT", "a/b", "project"),
        ("WANDB_RUN_ID", "a/b", "Run ID"),
    ],
)
def test_what_wandb_refuses_keeps_the_run_offline(unset, server, configure, tmp_path, name, value, reason):
    """The server answers, but the run cannot be opened there."""
    wandb.teardown()  # it keeps the environment of the test before
    unset.setenv("WANDB_BASE_URL", server)
    unset.setenv(name, value)
    config = configure("experiment=smoke", "logger=wandb", f"run.dir={tmp_path}")
    acquire_run_dir(config)
    accelerator = Accelerator(cpu=True)
    said = start(config, processes(accelerator=accelerator), run_id(tmp_path))
    run = accelerator.get_tracker("wandb", unwrap=True)
    assert run.offline and "wandb sync" in said and reason in said
    assert os.environ[name] == value
    run.finish()
