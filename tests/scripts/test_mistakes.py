"""Wrong values of every script's options: one line that names them, and no file that was there before is changed."""

import importlib
import shutil
from pathlib import Path

import pytest

from tests.errors import check_names
from tests.runs import SHORT
from trainer.loop import Trainer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
MISTAKES = {
    "sample good --prompt a --seed 99999999999999999999": ["--seed 9999", "give a number from 0"],
    "sample good --prompt a --device meta": ["--device meta", "cpu"],
    "sample good --prompt a --tokens -1": ["--tokens -1", "at least 1"],
    "sample noweights --prompt a": ["noweights", "no good checkpoint"],
    "sample afile --prompt a": ["afile", "no good checkpoint"],
    "sample good/metrics.jsonl --prompt a": ["good/metrics.jsonl", "no good checkpoint"],
    "evaluate good --device moon": ["--device moon", "cpu"],
    "evaluate good --batch 0": ["--batch 0", "at least 1"],
    "evaluate good --batch -3": ["--batch -3", "at least 1"],
    "evaluate good --limit 0": ["--limit 0", "at least 1"],
    "evaluate noweights": ["noweights", "no good checkpoint"],
    "export good . --hf": ["README.md", "give a new folder"],
    "export good good --hf": ["good", "give a new folder"],
    "export good good/metrics.jsonl": ["good/metrics.jsonl", "there already"],
    "export good afile/x": ["afile/x", "cannot be written"],
    "export torn out": ["torn", "manifest.json"],
    "plan experiment=smoke --ranks 0": ["--ranks 0"],
    "plan experiment=smoke --efficiency nan": ["--efficiency nan"],
    "plan experiment=smoke data.tokenizer=nope": ["data.tokenizer=nope", "byte"],
    "compare afile": ["nothing to draw"],
    "compare good --out afile/x": ["--out afile/x", "cannot write"],
    "compare good --baseline nope": ["--baseline nope", "muon"],
    "tune optim=muon,muon experiment=smoke": ["optim=muon,muon", "twice"],
    "tune optim=muon seeds=1,1 experiment=smoke": ["seeds=1,1", "twice"],
    "tune optim=muon folder=afile experiment=smoke": ["folder=afile", "folder"],
    "tune optim=muon folder= experiment=smoke": ["folder=", "give one"],
    "tune optim=track3/muon,track3/adam experiment=track3": ["3250", "track3/adam 5625", "train.steps=…"],
    "tune optim=muon experiment=smoke optim.tune.matrix.lr=x": ["optim.tune.matrix.lr=x", "LOW..HIGH"],
    "tune report=study": ["study/tune.json", "damaged"],
    "prepare_data data=local +data.foo=3": ["data.foo=3", "no such key"],
    "prepare_data data=local data.source=text data.dir=": ["data.dir=", "empty"],
    "prepare_data data=local data.source={_target_:os.system,command:false} data.dir=out": ["os.system", "not a class"],
    "prepare_data data=local data.source=afile data.dir=out": ["data.source=afile"],
    "prepare_data data=local data.source=text data.dir=afile": ["data.dir=afile"],
    "prepare_data verify afile": ["afile", "problem"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, configure):
    """A folder with a run, one without weights, a torn one, a file, and a folder that holds other things."""
    folder = tmp_path_factory.mktemp("place")
    for name, words in {"good": [], "noweights": ["checkpoint.every=null", "checkpoint.last=false"]}.items():
        Trainer(configure(*SHORT, "train.steps=3", *words, f"run.dir={folder / name}")).run()
    shutil.copytree(folder / "good", folder / "torn")
    for manifest in (folder / "torn").glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    files = {"afile": "", "README.md": "mine", "text/a.txt": "a", "study/tune.json": "{", "study/tune.db": ""}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(place, monkeypatch, capsys, command):
    if command.startswith("evaluate"):
        pytest.importorskip("lm_eval")
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.chdir(place)
    name, *words = command.split()
    before = content(place)
    capsys.readouterr()
    assert importlib.import_module(name).main(words) == 1
    check_names(capsys.readouterr().err.splitlines()[-1], "error: ", *MISTAKES[command])
    assert content(place) == before


def test_scores_that_have_no_line_are_said(place, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.syspath_prepend(SCRIPTS)
    evaluate = importlib.import_module("evaluate")
    assert not evaluate.record(place / "good", 99, {"x/acc": 1.0})
    assert not evaluate.record(place / "text", 3, {"x/acc": 1.0})
    assert evaluate.record(place / "good", 3, {"x/acc": float("nan")})


COUNTS = [
    "optim --slow-rounds 0",
    "polar --count -1",
    "sample --rounds 0",
    "step --blocks 2.5",
    "traffic --worlds 2 x",
    "checkpoint --repeat 0",
]


@pytest.mark.parametrize("words", COUNTS)
def test_benchmarks_count_from_one(monkeypatch, capsys, words):
    monkeypatch.syspath_prepend(SCRIPTS)
    name, *rest = words.split()
    monkeypatch.setattr("sys.argv", [name, *rest])
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmark_{name}").main()
    check_names(capsys.readouterr().err.splitlines()[-1], rest[0], repr(rest[-1]), "at least 1")
