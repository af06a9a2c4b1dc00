"""Random settings: each is right by a check that shares nothing with the schema, or is answered with one line.

``make soak`` draws a thousand.
"""

import math
import os
from dataclasses import asdict

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn

from common import UserError
from optim import routing
from trainer.launch import load_config

EXAMPLES = 1000 if "NANOMUON_SOAK" in os.environ else 40
OPTIMIZERS = ["adamw", "muon", "normuon", "shampoo", "soap", "scion", "lion", "sgd_momentum", "adagrad", "torch_muon"]
ROLE_KEYS = ["lr", "weight_decay", "momentum", "betas", "eps", "nesterov", "cautious", "foreach", "maximize", "fused"]
ROLE_KEYS += [
    "polar_steps",
    "polar",
    "scale",
    "update_freq",
    "graft",
    "block",
    "root",
    "dtype",
    "split",
    "_target_",
    "lrr",
]
KEYS = [f"optim.{role}.{key}" for role in ("matrix", "embedding", "head", "scalar") for key in ROLE_KEYS]
KEYS += [
    f"train.{key}" for key in ("steps", "batch_tokens", "seq_len", "micro_batch", "clip", "max_minutes", "max_skips")
]
KEYS += ["train.dtype", "train.non_finite", "seed", "eval.every", "eval.tokens", "eval.target", "checkpoint.every"]
KEYS += ["checkpoint.keep_last", "checkpoint.keep_best", "checkpoint.minutes", "schedule.warmup", "schedule.name"]
KEYS += ["model.n_layer", "model.n_embd", "model.n_head", "model.qk_norm", "data.order", "data.tokens", "data.source"]
KEYS += ["data.tokenizer", "logger.every", "logger", "run.processes", "run.resume", "parallel", "optim", "schedule"]
KEYS += ["model", "data", "experiment", "run.name", "logger.tags", "parallel.timeout_minutes", "optim.bucket_bytes"]

WORDS = ["null", "none", "true", "False", "yes", "off", "''", "' '", "nan", "inf", "-inf", "[]", "{}", "[0.9,0.95]"]
WORDS += [
    "[0.9]",
    "[1,2,3]",
    "{tiny: 0.1}",
    "{a: {b: 1}}",
    "0",
    "-0.0",
    "1",
    "-1",
    "2",
    "1e400",
    "1e-400",
    "5.0",
    "0x10",
]
WORDS += ["1_000", "٣", "abc", "é", "../x", "~", "${seed}", "${nowhere}", "a=b", "[", "x" * 300, "muon", "eigh", "gpt2"]
WORDS += ["cosine", "byte", "float64", "os.system", "torch.optim.AdamW", "builtins.dict", "99999999999999999999", "0.5"]
VALUES = st.sampled_from(WORDS) | st.integers(-3, 5000).map(str) | st.floats(allow_nan=False).map(repr)


def right(config) -> str:
    """What a reader of the config would object to; nothing if all is well."""
    train, wrong = config.train, []

    def need(what: str, holds: bool) -> None:
        if not holds:
            wrong.append(what)

    need("train.steps", type(train.steps) is int and train.steps >= 1)
    need("train.seq_len", type(train.seq_len) is int and train.seq_len >= 1)
    need("train.batch_tokens", train.batch_tokens % (train.seq_len * train.micro_batch) == 0 and train.batch_tokens > 0)
    need("train.clip", train.clip is None or (train.clip > 0 and not math.isnan(train.clip)))
    need("seed", type(config.seed) is int and config.seed >= 0)
    need("eval", config.eval.every >= 1 and config.eval.tokens >= train.seq_len)
    need("eval.target", config.eval.target is None or math.isfinite(config.eval.target))
    need("checkpoint", config.checkpoint.keep_last >= 1 and config.checkpoint.keep_best >= 0)
    need("checkpoint.every", config.checkpoint.every is None or config.checkpoint.every >= 1)
    need("logger.every", config.logger.every >= 1)
    need("model", config.model.n_layer >= 1 and config.model.n_embd % config.model.n_head == 0)
    need("run.processes", config.run.processes is None or config.run.processes >= 1)
    for role in ("matrix", "embedding", "head", "scalar"):
        section = asdict(config.optim)[role]
        for key in ("lr", "weight_decay", "eps"):
            value = section.get(key)
            numbers = value if isinstance(value, list | tuple) else [value] * (value is not None)
            need(f"{role}.{key}={value}", all(math.isfinite(x) and x >= 0 for x in numbers))
        betas = section.get("betas", [])
        need(f"{role}.betas={betas}", isinstance(betas, list | tuple) and all(0 <= beta < 1 for beta in betas))
        need(f"{role}.momentum", 0 <= section.get("momentum", 0) <= 1)
        for key in ("nesterov", "cautious", "maximize"):
            need(f"{role}.{key}", type(section.get(key, True)) is bool)
    return ", ".join(wrong)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.norm = nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 8, bias=False)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(OPTIMIZERS), st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_settings_are_right_or_answered_with_one_line(optimizer, chosen):
    overrides = ["experiment=smoke", f"optim={optimizer}", *(f"{key}={value}" for key, value in chosen)]
    try:
        config = load_config(overrides)
        model = Tiny()
        routing.build_from_config(model, asdict(config.optim), None, "head")
    except UserError as error:
        event("answered")
        assert "\n" not in str(error).strip() and len(str(error)) > 10, overrides
        words = [word for key, _ in chosen for word in (key.rpartition(".")[0] or key, key.rpartition(".")[2])]
        assert any(word in str(error) for word in words), (overrides, str(error))
        return
    event("accepted")
    assert not right(config), (overrides, right(config))
