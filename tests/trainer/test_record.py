"""The record: what is written, that it survives crashes and resumes, and that its failures do not end a run."""

import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from tests.runs import read_record
from trainer.metrics import record as record_module
from trainer.metrics.console import Display, duration
from trainer.metrics.environment import peak_flops
from trainer.metrics.jsonl import JsonLines, read_lines
from trainer.metrics.record import Metrics, is_spike


class Accelerated(SimpleNamespace):
    """An Accelerator's trackers, without processes."""

    trackers = ()

    def log(self, line, step):
        for tracker in self.trackers:
            tracker(line, step)


def processes(**changes):
    known = {
        "is_main": True,
        "world_size": 1,
        "mode": "single",
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "accelerator": Accelerated(),
    }
    return SimpleNamespace(**known | changes)


@pytest.fixture
def shown():
    return io.StringIO()


@pytest.fixture
def open_record(configure, tmp_path, shown):
    def opened(*overrides, **changes):
        config = configure("experiment=smoke", "logger=jsonl", "train.steps=40", "eval.every=40",
                           f"run.dir={tmp_path}", *overrides)  # fmt: skip
        display = Display(config.train.steps, Console(file=shown, width=200))
        return Metrics(config, processes(**changes), display=display)

    return opened


def test_a_whole_record(open_record, tmp_path, shown, monkeypatch):
    monkeypatch.setenv("SOME_API_TOKEN", "hunter2")
    record = open_record()
    record.start([{"role": "matrix", "tensors": 4, "parameters": 1234567, "optimizer": "optim.Muon", "lr": 0.02}])
    record.add(0, {"val/loss": 5.5})
    for step in range(41):
        if step:
            record.add(step, {"train/loss": torch.tensor(5 / step, dtype=torch.float64), "lr/matrix": 0.02})
        if step == 40:
            record.add(step, {"val/loss": math.pi / 3})
        record.write(step, step / 3)
    record.finish()
    found = read_record(tmp_path)
    assert [line["step"] for line in found] == [*range(41)]
    assert all({"step", "tokens", "train_time_s"} <= set(line) for line in found)
    assert found[3]["train/loss"] == 5 / 3 and found[-1]["val/loss"] == math.pi / 3, "full precision"
    assert found[-1]["train/loss"] == 5 / 40, "a step has one line"
    assert found[1]["perf/tokens_per_s"] == pytest.approx(9216) and "perf/tokens_per_s" not in found[0]
    assert (tmp_path / "loss_vs_time.png").read_bytes().startswith(b"\x89PNG")
    config = OmegaConf.load(tmp_path / "config.yaml")
    assert isinstance(config.optim.matrix.lr, float) and config.train.micro_batch > 0
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__ and environment["device"] and environment["command"]
    assert "1,234,567" in shown.getvalue()
    last = shown.getvalue().splitlines()[-2]
    assert "final val loss 1.0472" in last and "13.3 s" in last and "9,216 tokens/s" in last
    for path in tmp_path.iterdir():
        assert b"hunter2" not in path.read_bytes()


@pytest.mark.parametrize(
    ("target", "hint"),
    [("tests.trainer.no_logits.NoLogits", []), ("tests.scripts.reads_values.ReadsValues", ["--trust-code"])],
)
def test_the_command_for_text_is_one_that_works(open_record, shown, target, hint):
    """Of a model of one's own, which sample.py imports only if it is told to, and of which it may get no text."""
    record = open_record("model=custom", f"model._target_={target}")
    record.start([])
    record.add(0, {"val/loss": 5.5})
    record.write(0, 0.0)
    record.finish()
    commands = [line.split() for line in shown.getvalue().splitlines() if "sample.py" in line]
    assert [words[-1:] for words in commands] == [hint][: len(hint)]


def measured(record: Metrics, step: int, seconds: float) -> None:
    record.add(step, {"train/loss": float(step)})
    record.write(step, seconds)


def test_only_rank_0_writes(open_record, tmp_path, shown):
    record = open_record(is_main=False, world_size=2)
    record.start([{"role": "matrix"}])
    record.add(0, {"val/loss": 1.0})
    record.write(0, 0.0)
    record.message("hello")
    record.finish()
    assert not list(tmp_path.iterdir()) and not shown.getvalue()


def test_resume_keeps_every_step_once(open_record, tmp_path):
    record = open_record()
    record.start()
    for step in range(1, 8):
        measured(record, step, float(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tok')  # killed while writing
    again = open_record()
    again.start(step=5, unfinished=False)
    measured(again, 6, 5.5)
    assert [line["step"] for line in read_record(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert read_record(tmp_path)[-1]["perf/tokens_per_s"] == 2 * 3072, "speed goes on from the last line that is kept"


def test_a_start_at_step_0_writes_its_line_once(open_record, tmp_path):
    """As after a kill before the first checkpoint; what was measured later, trainer.run.resume has kept aside."""
    for _ in range(2):
        record = open_record()
        record.start()
        measured(record, 0, 0.0)
    assert len(read_record(tmp_path)) == 1


def test_mfu(open_record, tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "peak_flops", lambda device: 1e6)
    record = open_record(world_size=2, dtype=torch.bfloat16)
    record.start(flops_per_token=100.0)
    measured(record, 1, 0.5)
    assert read_record(tmp_path)[0]["perf/mfu"] == pytest.approx(2 * 3072 * 100 / 2e6)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA Foo", None),
    ],
)
def test_peak_of_known_devices(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == flops
    assert peak_flops(torch.device("cpu")) is None


class Watched(torch.Tensor):
    """Counts how often the host asks for its value."""

    READS = {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.__bool__, torch.Tensor.__float__}
    asked = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.asked += function in cls.READS
        return super().__torch_function__(function, types, args, kwargs or {})


def test_on_a_gpu_the_host_waits_where_a_line_is_due(open_record, tmp_path):
    """Values of the steps between are read then, all at once; those that say something unusual get their lines."""
    record = open_record("logger.every=10", "eval.every=20")
    record.on_host, Watched.asked = False, 0
    record.start()
    for step in range(1, 21):
        loss = torch.tensor(3.0 + 0.001 * (step % 3)).as_subclass(Watched)
        record.add(step, {"train/loss": loss, "skipped": torch.tensor(float(step == 4))})
        record.write(step, float(step))
        assert Watched.asked == step // 10
    found = read_record(tmp_path)
    assert [line["step"] for line in found] == [4, 10, 20]
    assert (found[0]["skipped"], found[0]["batch"]) == (1, 3) and "skipped" not in found[1]


def test_a_leap_of_the_loss_is_written_down(open_record, tmp_path):
    record = open_record("logger.every=40")
    record.start()
    for step, loss in enumerate([2.0 + 0.01 * (k % 3) for k in range(20)] + [9.0, 2.0], start=1):
        record.add(step, {"train/loss": torch.tensor(loss)})
        record.write(step, float(step))
    [line] = read_record(tmp_path)
    assert (line["step"], line["batch"]) == (21, 20)
    assert line["spike"] == pytest.approx(7.0, abs=0.02)


def test_what_is_noted_goes_into_the_next_line(open_record, tmp_path):
    record = open_record("logger.every=2")
    record.start()
    for step in range(1, 5):
        record.add(step, {"train/loss": 1.0})
        record.write(step, float(step))
        if step == 2:
            record.note(**{"checkpoint/failed": "no room"})
    assert [line.get("checkpoint/failed") for line in read_record(tmp_path)] == [None, "no room"]


@given(st.lists(st.floats(1.0, 2.0), min_size=16, max_size=64), st.floats(0.0, 100.0))
def test_spikes_are_far_above_the_rest(recent, loss):
    assert not is_spike(recent[:15], loss)
    if len(recent) <= 30 or len(set(recent)) == 1:  # one of n is at most sqrt(n - 1) deviations above the mean of all
        assert not is_spike(recent, max(recent))
    if loss <= sum(recent) / len(recent):
        assert not is_spike(recent, loss)
    assert is_spike(recent, 9.0), "six deviations are at most 3 here"


def test_failing_parts_are_told_once_and_left_out(open_record, tmp_path, shown, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no route")

    record = open_record()
    record.start()
    record.parallel.accelerator.trackers = [broken]
    monkeypatch.setattr(record_module, "loss_vs_time", broken)
    for step in (1, 2, 3):
        measured(record, step, float(step))
    record.finish()
    assert len(read_record(tmp_path)) == 3
    assert shown.getvalue().count("wandb failed") == 1 and shown.getvalue().count("loss_vs_time.png failed") == 1


def test_a_failed_run_leaves_the_screen_and_wandb(open_record, monkeypatch):
    ended = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=object(), finish=lambda **how: ended.append(how)))
    record = open_record()
    record.start()
    record.display.bar = SimpleNamespace(stop=lambda: ended.append("bar"))
    record_module.abandon()
    assert ended == ["bar", {"exit_code": 1}]


@given(st.integers(0, 400), st.integers(-1, 6))
def test_a_file_cut_anywhere_loses_no_whole_line(tmp_path_factory, cut, last_step):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    written = [{"step": step, "train/loss": 1 / (step + 1)} for step in range(8)]
    whole = [json.dumps(line) + "\n" for line in written]
    path.write_text("".join(whole)[:cut])
    complete = [line for n, line in enumerate(written) if len("".join(whole[: n + 1]).rstrip("\n")) <= cut]
    file = JsonLines(path, [line for line in read_lines(path) if line["step"] <= last_step])
    file.append({"step": 99})
    file.close()
    assert read_lines(path) == [line for line in complete if line["step"] <= last_step] + [{"step": 99}]


def test_a_full_disk_delays_lines(tmp_path):
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    real = file.file

    class Full:
        """Accepts five bytes, then no more."""

        def write(self, data):
            return real.write(data[:5])

        def __getattr__(self, name):
            return getattr(real, name)

    file.file = Full()
    for step in (2, 3):
        with pytest.raises(OSError):
            file.append({"step": step})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n', "no half line"
    file.file = real
    file.append({"step": 4})
    assert [line["step"] for line in read_record(tmp_path)] == [1, 2, 3, 4]


def test_what_json_cannot_say_becomes_null(tmp_path):
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "train/loss": math.nan, "grad_norm": math.inf})
    assert read_record(tmp_path) == [{"step": 1, "train/loss": None, "grad_norm": None}]


def test_lines_without_a_terminal(shown):
    display = Display(1000, Console(file=shown, width=200))
    display.start()
    for step in range(1, 1001):
        display.update({"step": step, "train_time_s": step / 10, "train/loss": 3.0, "perf/tokens_per_s": 12345.6})
    display.update({"step": 1000, "train_time_s": 100.0, "val/loss": 2.5})
    display.stop()
    text = shown.getvalue().splitlines()
    assert len(text) == 21 and "val 2.5" in text[-1]
    assert text[0] == "step 50/1000  train 3.0000  12,346 tokens/s  5.0 s trained, 1:35 left"


def test_bar_in_a_terminal(shown):
    console = Console(file=shown, force_terminal=True, width=120, color_system=None)
    display = Display(10, console)
    display.start(step=4)
    display.update({"step": 5, "train_time_s": 60.0, "train/loss": 3.25, "perf/mfu": 0.415})
    display.update({"step": 5, "train_time_s": 60.0, "val/loss": 3.5})
    display.message("saved [1]")
    display.stop()
    for words in ("5/10", "train 3.2500  val 3.5000", "MFU 41.5%", "1:00 trained, 1:00 left", "saved [1]"):
        assert words in shown.getvalue()


def test_durations():
    assert [duration(s) for s in (0, 59.94, 245, 7384)] == ["0.0 s", "59.9 s", "4:05", "2:03:04"]
