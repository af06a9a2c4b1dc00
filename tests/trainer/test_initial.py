"""A run that begins with weights from elsewhere."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from common import UserError
from tests.errors import raises_naming
from tests.runs import read_losses
from trainer.run.huggingface import bare_name, hf_config
from trainer.run.initial import load_initial, read_initial

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
GPT2 = ["model.norm=layernorm", "model.activation=gelu", "model.tied=true", "model.bias=true"]


@pytest.fixture
def gpt2(configure, tmp_path):
    """A GPT-2 of the tests' size, with random weights, as transformers writes it."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    config = configure(*GPT2, "model.n_layer=2", "experiment=smoke", "model.n_embd=16", "model.n_head=2").model
    theirs = GPT2LMHeadModel(hf_config(config, 257, 24, 256)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "hf")
    return theirs


def linear_layout(theirs, prefix: str = "") -> dict[str, torch.Tensor]:
    """nanoGPT's: matrices (out, in), and a vocabulary padded with what it has trained there."""
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {prefix + name: tensor.t().contiguous() if name.endswith(linear) else tensor.clone()
             for name, tensor in theirs.state_dict().items()}  # fmt: skip
    wte = prefix + "transformer.wte.weight"
    state[wte] = state[prefix + "lm_head.weight"] = torch.cat([state[wte], torch.ones(63, 16)])
    return state


@pytest.mark.parametrize("kind", ["hf", "nanogpt", "compiled"])
def test_logits_are_theirs_and_training_goes_on(run, gpt2, tmp_path, kind):
    """The first validation loss is that of the weights; train.seq_len=16 takes the first of their 24 positions."""
    source = f"hf:{tmp_path / 'hf'}"
    if kind == "nanogpt":
        about = dict(n_layer=2, n_head=2, n_embd=16, block_size=24, bias=True, vocab_size=320)
        source = str(tmp_path / "ckpt.pt")
        torch.save({"model": linear_layout(gpt2), "model_args": about, "iter_num": 3}, source)
    if kind == "compiled":
        source = str(tmp_path / "x.safetensors")
        state = {f"_orig_mod.module.{name}": value.clone() for name, value in gpt2.state_dict().items()}
        save_file(state, source)
    trainer = run("run", *GPT2, "model.n_layer=2", f"run.init={source}", "train.steps=3", "optim.lr_scale=1e-9")
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(tokens), gpt2(tokens).logits, rtol=1e-4, atol=1e-4)
    losses = [row[2] for row in read_losses(tmp_path / "run") if row[2] is not None]
    faster = run("faster", *GPT2, "model.n_layer=2", f"run.init={source}")
    assert faster.progress.val_loss < losses[0] - 0.1, "it trains"


def test_a_run_that_goes_on_needs_them_no_more_and_keeps_them_in_its_name(run, gpt2, tmp_path):
    words = [*GPT2, "model.n_layer=2", f"run.init={tmp_path / 'hf'}"]
    run("run", *words, "train.max_minutes=1e-9")
    with raises_naming(UserError, "run.init"):
        run("run", *GPT2, "model.n_layer=2")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert run("run", *words).progress.step == 6
    with raises_naming(UserError, "run.init=", "model.safetensors"):
        run("other", *words)


@pytest.mark.parametrize("mistake", ["heads", "layers", "activation", "architecture", "pickle", "length"])
def test_weights_of_another_model_are_refused(configure, run, gpt2, tmp_path, mistake):
    words, source = [*GPT2, "model.n_layer=2"], f"hf:{tmp_path / 'hf'}"
    config = tmp_path / "hf" / "config.json"
    names = {"heads": ["n_head is 2 there", "model.n_head=4"], "layers": ["n_layer is 2 there", "model.n_layer=3"],
             "activation": ["activation_function is relu there"], "architecture": ["model.norm=rmsnorm", "layernorm"],
             "pickle": ["weights alone"], "length": ["train.seq_len of 32", "[24, 16]"]}[mistake]  # fmt: skip
    words += {"heads": ["model.n_head=4"], "layers": ["model.n_layer=3"], "architecture": ["model.norm=rmsnorm"],
              "length": ["train.seq_len=32"]}.get(mistake, [])  # fmt: skip
    if mistake == "activation":
        config.write_text(config.read_text().replace("gelu_new", "relu"))
    if mistake == "pickle":
        source = str(tmp_path / "ckpt.pt")
        torch.save({"model": print}, source)
    with raises_naming(UserError, f"run.init={source}", *names):
        run("run", *words, f"run.init={source}")


BROKEN = {
    "a folder without weights": ["model.safetensors"],
    "a run": ["run.from", "scripts/export.py"],
    "torn": ["torn.safetensors", "cannot be read"],
    "empty": ["torn.safetensors", "cannot be read"],
    "other shapes": ["blocks.0.attn.q.weight is [3, 3] there and [16, 16] here"],
    "one too many": ["blocks.9.x is [2] there and missing here"],
    "whole numbers": ["norm.weight", "int8"],
    "not finite": ["norm.weight", "no finite weights"],
    "vectors for matrices": ["run.init="],
    "settings that are none": ["run.init="],
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_no_weights_is_one_line(configure, run, tmp_path, fault):
    source = tmp_path / "torn.safetensors"
    trainer = run("run", "train.steps=3")
    good = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    changed = {"other shapes": {"blocks.0.attn.q.weight": torch.zeros(3, 3)},
               "one too many": {"blocks.9.x": torch.ones(2)},
               "whole numbers": {"norm.weight": torch.ones(16, dtype=torch.int8)},
               "not finite": {"norm.weight": torch.full((16,), float("nan"))}}  # fmt: skip
    words: list[str] = []
    if fault in changed:
        save_file(good | changed[fault], source)
    elif fault in ("torn", "empty"):
        save_file(good, source)
        source.write_bytes(source.read_bytes()[: 99 if fault == "torn" else 0])
    elif fault in ("vectors for matrices", "settings that are none"):
        words, source = [*GPT2, "model.n_layer=2"], tmp_path / "ckpt.pt"
        vectors = {"transformer.wte.weight": torch.ones(3), "transformer.wpe.weight": torch.ones(3)}
        torch.save({"model": vectors, "model_args": 5 if fault == "settings that are none" else {}}, source)
    else:
        source = tmp_path / "run" if fault == "a run" else tmp_path
    with raises_naming(UserError, f"run.init={source}", *BROKEN[fault]):
        run("other", *words, f"run.init={source}")


def test_an_error_of_one_rank_is_that_of_all(run, tmp_path):
    """Where another rank cannot read what this one can, this one must not go on alone to the next collective."""
    trainer = run("run", "train.steps=3")
    save_file(trainer.model.state_dict(), tmp_path / "x.safetensors")

    def gather(compute):
        compute()
        raise UserError("rank 1: no such file")

    trainer.config.run.init, trainer.config.run.dir = str(tmp_path / "x.safetensors"), str(tmp_path / "new")
    with raises_naming(UserError, "rank 1"):
        load_initial(trainer.config, trainer.model, SimpleNamespace(gather=gather, broadcast_rank0=lambda read: read()))


def test_names_without_what_wrappers_put_before_them():
    assert bare_name("_orig_mod.module.transformer.h.0.attn.c_attn.weight") == "h.0.attn.c_attn.weight"
    with raises_naming(ValueError, "model.safetensors"):
        read_initial("hf:nowhere", None)
