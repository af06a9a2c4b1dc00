"""Text from a run's folder: the same for the same seed, whatever ranks wrote the checkpoint, and clear errors."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.errors import check_names
from tests.runs import TINY, read_record, train
from trainer.evaluate.generate import Sampling, complete, printable
from trainer.run.weights import find_checkpoint, load_trained

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import sample  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def text(capsys, monkeypatch):
    """``text(RUN, "--seed", "1")`` -> what sample.py prints, without its remarks."""

    def printed(*words: object, lines: str = "") -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        assert sample.main([*map(str, words), "--tokens", "40", "--device", "cpu"]) == 0
        return capsys.readouterr().out

    return printed


def test_text_of_a_run(run, text, tmp_path, capsys):
    trainer, folder = run("run"), tmp_path / "run"
    capsys.readouterr()
    first = text(folder, "--prompt", "The c")
    assert first.startswith("The c") and first == text(folder, "--prompt", "The c")
    assert len({first, text(folder, "--prompt", "The c", "--seed", 1), text(f"{folder}@4", "--prompt", "The c")}) == 3
    trained = load_trained(find_checkpoint(folder)[0])
    expected = trainer.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trained.model.state_dict().items())
    [whole] = complete(trained.model, trained.tokenizer, "The c", 40, Sampling(), seed=0)
    assert first == printable(whole) + "\n", "as it is drawn, and at once"
    assert len(text(folder, "--prompt", "a", "--samples", 3).split("\n---\n")) == 3
    assert text(folder, lines="The c\nThe c\n") == first + first, "prompts from the input"
    greedy = [text(folder, "--prompt", "a", "--temperature", 0, "--seed", seed) for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_text_at_every_evaluation(run, tmp_path, capsys):
    run("run", "eval.sample=The c", "eval.sample_tokens=7")
    lines = [line for line in read_record(tmp_path / "run") if "val/loss" in line]
    assert [line["sample"][:5] for line in lines] == ["The c"] * 3 and len(lines[-1]["sample"]) <= 5 + 7
    assert "  | The c" in capsys.readouterr().out


@pytest.mark.slow
def test_checkpoints_of_any_ranks_give_the_same_text(text, tmp_path):
    for ranks in (0, 2):
        done = train(*TINY, "train.steps=4", "eval.every=4", "train.dtype=float64", "eval.sample=The c",
                     f"run.dir={tmp_path}/{ranks}", ranks=ranks)  # fmt: skip
        assert done.returncode == 0, done.stderr
    for words in (["--prompt", "The c"], ["--prompt", "a", "--samples", "4", "--top-k", "50"]):
        assert text(tmp_path / "0", *words) == text(tmp_path / "2", *words)
    samples = [[line.get("sample") for line in read_record(tmp_path / ranks)] for ranks in ("0", "2")]
    assert samples[0] == samples[1] and samples[0][-1]


@pytest.mark.parametrize("mistake", ["no run", "step", "setting", "device", "class", "logits", "weights"])
def test_errors_are_one_line(run, tmp_path, capsys, mistake):
    words, folder = [], tmp_path / "run"
    if mistake in ("class", "logits"):
        run("run", "model=custom", "model._target_=tests.trainer.no_logits.NoLogits")
        words = ["--trust-code"] if mistake == "logits" else []
    elif mistake != "no run":
        run("run")
    if mistake == "weights":
        state = folder / "checkpoints" / "step_00000006" / "state.json"
        changed = json.loads(state.read_text())
        changed["config"]["model.n_layer"] = 2
        state.write_text(json.dumps(changed))
        manifest = state.with_name("manifest.json")
        content = json.loads(manifest.read_text())
        from trainer.run.storage import fingerprint

        content["files"]["state.json"] = fingerprint(state)
        manifest.write_text(json.dumps(content))
    words += {"setting": ["--top-p", "0"], "device": ["--device", "moon"]}.get(mistake, [])
    place = f"{folder}@5" if mistake == "step" else folder
    assert sample.main([str(place), "--prompt", "a", *words]) == 1
    names = {"no run": [folder, "does not exist"], "step": ["update 5", "4, 6"], "setting": ["top_p=0", "give"],
             "device": ["--device moon"], "class": ["NoLogits", "--trust-code"], "logits": ["NoLogits", "targets=None"],
             "weights": ["blocks.1", "missing"]}  # fmt: skip
    check_names(capsys.readouterr().err.splitlines()[-1], "error: ", *names[mistake])


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\nä\t\x9b") == "a\ufffd[2J\nä\t\ufffd"
