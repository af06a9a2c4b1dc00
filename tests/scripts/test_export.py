"""Exported weights are the trained ones, for us and for transformers."""

import shutil
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data import load_tokenizer
from tests.errors import check_names
from trainer.evaluate.generate import Sampling, complete
from trainer.run.hf_tokenizer import fast_tokenizer
from trainer.run.weights import find_checkpoint, load_trained

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


@pytest.mark.parametrize("kind", ["gpt2", "own code"])
def test_transformers_reads_it_and_writes_the_same_text(run, tmp_path, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

    trainer = run("run", *(GPT2 if kind == "gpt2" else ["model.position=half_rope", "model.qk_norm=true"]))
    assert export.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--hf"]) == 0
    trust = {"trust_remote_code": True} if kind == "own code" else {}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **trust).eval()
    assert isinstance(theirs, GPT2LMHeadModel) == (kind == "gpt2")
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, trainer.model(tokens), rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", **trust)
    assert tokenizer("aä")["input_ids"] == [256, *"aä".encode()] and theirs.generation_config.eos_token_id == 256
    trained = load_trained(find_checkpoint(tmp_path / "run")[0])
    torch.manual_seed(7)
    drawn = theirs.generate(**tokenizer("The c", return_tensors="pt"), max_new_tokens=10)[0]
    ours = complete(trained.model, trained.tokenizer, "The c", 10, Sampling(), seed=7)
    assert [tokenizer.decode(drawn, skip_special_tokens=True)] == ours
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"| 6 | 2304 | {trainer.progress.val_loss:.4f} |" in card and str(tmp_path) not in card


def test_a_model_without_biases_goes_as_gpt2_with_biases_of_zero(run, tmp_path):
    from transformers import GPT2LMHeadModel

    trainer = run("run", *GPT2, "model.bias=false")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--hf"]) == 0
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, trainer.model(tokens), rtol=1e-4, atol=1e-4)


def test_gpt2s_tokenizer_as_a_fast_one(tmp_path):
    from transformers import AutoTokenizer

    ours = load_tokenizer("gpt2")
    fast_tokenizer(ours, 1024).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello, naïve 東京\n\n  def f(x):\n\treturn x's 123456!", "", " I'LL  we've \r\n", "é\u200b😀" * 3):
        tokens = theirs(text)["input_ids"]
        assert tokens == [50256, *ours.encode(text)]
        assert theirs.decode(tokens, skip_special_tokens=True) == text


class Hub:
    """What of huggingface_hub's HfApi is used."""

    uploaded: ClassVar[dict[str, set[str]]] = {}

    def create_repo(self, name: str, *, exist_ok: bool) -> None:
        if "/" not in name:
            raise ValueError(f"{name} has no owner\nand more lines")
        assert exist_ok

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> str:
        self.uploaded[repo_id] = {path.name for path in folder_path.iterdir()}
        return f"https://hub/{repo_id}"


@pytest.mark.parametrize(("name", "code"), [("me/mine", 0), ("mine", 1)])
def test_pushed_to_a_hub(run, tmp_path, capsys, monkeypatch, name, code):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "HfApi", Hub)
    run("run")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--hf", "--push", name]) == code
    said = capsys.readouterr()
    if code == 0:
        assert "uploaded: https://hub/me/mine" in said.out
        assert Hub.uploaded[name] >= {"model.safetensors", "config.json", "README.md", "tokenizer.json"}
    else:
        words = "error: ", "--push mine", "has no owner", "hf upload mine", tmp_path / "out"
        check_names(said.err.splitlines()[-1], *words)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_is_pushed_is_for_transformers(capsys):
    with pytest.raises(SystemExit):
        export.main(["run", "out", "--push", "me/mine"])
    check_names(capsys.readouterr().err.splitlines()[-1], "--push", "--hf")


@pytest.mark.parametrize("damage", ["none", "empty", "weights"])
def test_errors_are_one_line(run, tmp_path, capsys, damage):
    folder = tmp_path / "run"
    if damage != "none":
        run("run")
    if damage == "empty":
        shutil.rmtree(folder / "checkpoints")
    if damage == "weights":
        for path in folder.glob("checkpoints/*/__0*"):
            path.write_bytes(b"")
    assert export.main([str(folder), str(tmp_path / "out")]) == 1
    why = "not exist" if damage == "none" else "no good checkpoint"
    check_names(capsys.readouterr().err.splitlines()[-1], "error: ", str(folder), why)
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
