"""Exported weights are the trained ones, for us and for transformers."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.errors import check_names

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import export  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
GPT2 = ["model.n_layer=2", "model.norm=layernorm", "model.activation=gelu", "model.tied=true", "model.bias=true"]


def test_our_names(run, tmp_path, capsys):
    trainer = run("run")
    out = tmp_path / "weights.safetensors"
    assert export.main([str(tmp_path / "run"), str(out)]) == 0
    assert "after update 6" in capsys.readouterr().out
    expected = trainer.model.state_dict()
    found = load_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with safe_open(out, "pt") as file:
        assert file.metadata()["step"] == "6"


def test_transformers_reads_it(run, tmp_path):
    from transformers import GPT2LMHeadModel

    trainer = run("run", *GPT2)
    assert export.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--hf"]) == 0
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, trainer.model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damage", ["none", "weights", "architecture"])
def test_errors_are_one_line(run, tmp_path, capsys, damage):
    folder = tmp_path / "run"
    options = []
    if damage != "none":
        run("run")
    if damage == "weights":
        for path in folder.glob("checkpoints/*/__0*"):
            path.write_bytes(b"")
    if damage == "architecture":
        options = ["--hf"]
    assert export.main([str(folder), str(tmp_path / "out"), *options]) == 1
    words = {"architecture": ["model.norm=rmsnorm", "layernorm"]}.get(damage, [str(folder), "no good checkpoint"])
    check_names(capsys.readouterr().err.splitlines()[-1], "error: ", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["below a file", "a folder"])
def test_a_place_that_cannot_be_written(run, tmp_path, capsys, place):
    run("run")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    out = {"below a file": tmp_path / "file" / "out", "a folder": tmp_path / "folder"}[place]
    assert export.main([str(tmp_path / "run"), str(out)]) == 1
    check_names(capsys.readouterr().err.splitlines()[-1], "error: ", out, "cannot be written")
    assert (tmp_path / "file").read_text() == "kept" and not list(tmp_path.rglob("*.partial"))


def test_another_model_exports_our_names_but_not_transformers(run, tmp_path, capsys):
    target = "examples.grouped_query_gpt.GroupedQueryGPT"
    trainer = run("run", "model=custom", f"model._target_={target}")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 0
    assert load_file(tmp_path / "out.safetensors").keys() == trainer.model.state_dict().keys()
    assert export.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--hf"]) == 1
    words = f"model._target_={target}", "trainer.model.GPT", "--hf"
    check_names(capsys.readouterr().err.splitlines()[-1], "error: ", *words)
    assert not (tmp_path / "hf").exists()
