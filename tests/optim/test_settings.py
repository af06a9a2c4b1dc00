"""A setting means what its class says, whether it comes from a config, a constructor or a parameter group."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from optim import SOAP, AdagradInside, Lion, Muon, NorMuon, RMSpropInside, Scion, Shampoo, Signum, Steepest
from optim.named_state import load_named
from optim.routing import ROLES, build_from_config, resolve_target
from optim.settings import settings_of, typed
from tests.errors import raises_naming
from trainer.config import resolve_optim
from trainer.language_model import ModelConfig

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.1, "fused": True}
INF, NAN = float("inf"), float("nan")
MATRIX = [Muon, NorMuon, Scion, Steepest, Shampoo, SOAP]


def resolve(role="matrix", lr_scale=1.0, **settings):
    """The role's settings as the trainer's config ends up with them."""
    base = {"_target_": "optim.Muon", "lr": 0.1} if role == "matrix" else ADAMW
    config = SimpleNamespace(lr_scale=lr_scale, **{r: dict(ADAMW) for r in ROLES} | {role: base | settings})
    resolve_optim(config, ModelConfig())
    return getattr(config, role)


@pytest.mark.parametrize(
    ("role", "key", "given", "meant"),
    [
        ("matrix", "cautious", "no", False),
        ("matrix", "nesterov", "off", False),
        ("matrix", "cautious", 1, True),
        ("matrix", "polar_steps", 5.0, 5),
        ("matrix", "bucket_bytes", 1e6, 1_000_000),
        ("matrix", "momentum", "0.9", 0.9),
        ("embedding", "maximize", "off", False),
        ("scalar", "amsgrad", "Yes", True),
        ("head", "eps", "1e-9", 1e-9),
    ],
)
def test_a_value_is_read_as_the_class_says(role, key, given, meant):
    value = resolve(role, **{key: given})[key]
    assert value == meant and type(value) is type(meant)


@pytest.mark.parametrize(
    ("role", "settings", "words"),
    [
        ("matrix", {"weight_decay": "none"}, ("optim.matrix.weight_decay=none", "a number")),
        ("matrix", {"lr": True}, ("optim.matrix.lr=True", "a number")),
        ("matrix", {"lr": None}, ("optim.matrix.lr=None", "a number")),
        ("matrix", {"polar_steps": 5.5}, ("optim.matrix.polar_steps=5.5", "whole number", "null")),
        ("matrix", {"scale": 5}, ("optim.matrix.scale=5", "a name")),
        ("matrix", {"cautious": "maybe"}, ("optim.matrix.cautious=maybe", "true or false")),
        ("matrix", {"dtype": "int8"}, ("optim.matrix.dtype=int8", "bfloat16")),
        ("matrix", {"weight_decay": -1}, ("optim.matrix", "weight_decay=-1", ">= 0")),
        ("matrix", {"lr": float("nan")}, ("optim.matrix.lr=nan", "a finite number")),
        ("embedding", {"foreach": True}, ("optim.embedding", "fused", "foreach")),
        ("embedding", {"fused": "none"}, ("optim.embedding.fused=none", "true or false", "null")),
        ("embedding", {"betas": 0.9}, ("optim.embedding.betas=0.9", "2 numbers")),
        ("embedding", {"betas": [0.9]}, ("optim.embedding.betas=[0.9]", "2 numbers")),
        ("scalar", {"amsgrad": "nope"}, ("optim.scalar.amsgrad=nope", "true or false")),
        ("scalar", {"_target_": "optim.Muon", "fused": None}, ("optim.scalar", "fused")),
    ],
)
def test_what_it_cannot_mean_is_one_line(role, settings, words):
    with raises_naming(ValueError, *words) as _:
        resolve(role, **settings)


def test_settings_that_only_a_step_finds_impossible():
    for target, words in {
        "torch.optim.LBFGS": ("optim.scalar", "closure"),
        "torch.optim.SparseAdam": ("optim.scalar", "dense"),
        "optim.Muon": ("optim.scalar", "matrices"),
    }.items():
        config = SimpleNamespace(lr_scale=1.0, **{role: dict(ADAMW) for role in ROLES})
        config.scalar = {"_target_": target}
        with raises_naming(ValueError, *words):
            resolve_optim(config, ModelConfig())


def test_lr_scale_multiplies_what_was_read():
    assert resolve(lr="1e-2", lr_scale=2.0)["lr"] == 0.02


@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.Popen", "builtins.open", "torch.nn.Linear", "pathlib.Path"]
)
def test_what_is_no_optimizer_is_not_called(target):
    with raises_naming(ValueError, f"optim.matrix._target_={target}", "optimizer", "torch.optim.AdamW"):
        resolve_target({"_target_": target}, "optim.matrix")


def test_a_module_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_rule.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with raises_naming(ValueError, "optim.matrix._target_=broken_rule.X", "division by zero"):
        resolve_target({"_target_": "broken_rule.X"}, "optim.matrix")


def test_types_come_from_annotations_of_all_bases_or_from_defaults():
    assert settings_of(Muon)["bucket_bytes"] is int and settings_of(NorMuon)["nesterov"] is bool
    assert not {"params", "process_group"} & settings_of(Muon).keys()

    class Plain(torch.optim.Optimizer):
        def __init__(self, params, lr=1, nesterov=False, extra=None, wrong: "NotDefined" = 0.5):  # noqa: F821
            super().__init__(params, {})

    hints = settings_of(Plain)
    assert hints["lr"] is float and hints["nesterov"] is bool and hints["wrong"] is float
    assert typed({"any": 1}, hints["extra"]) == {"any": 1}


WRONG = [
    (MATRIX, "lr", -0.1),
    (MATRIX, "lr", float("nan")),
    ([Muon, SOAP, Lion], "lr", 1e300),
    ([Muon, Lion], "lr", 10**400),
    ([SOAP, Lion], "betas", 0.9),
    ([SOAP, Lion], "betas", torch.tensor([0.9, 0.95])),
    ([Muon, Shampoo, Lion, Signum], "weight_decay", -0.1),
    ([Muon, SOAP, Steepest, Lion], "weight_decay", float("nan")),
    ([NorMuon, SOAP, AdagradInside, RMSpropInside], "eps", -1e-8),
    ([NorMuon, Shampoo, AdagradInside], "eps", float("nan")),
    ([Muon, NorMuon, Scion, Steepest, Signum], "momentum", 1.0),
    ([SOAP, Shampoo, Lion], "betas", (0.9,)),
    ([NorMuon], "beta2", 1.0),
    ([Shampoo], "graft_eps", -1.0),
    ([Shampoo], "exponent", float("nan")),
    ([Shampoo, SOAP], "update_freq", 2.5),
    ([SOAP], "max_dim", -1),
    ([Scion], "radius", -1.0),
    ([Muon, Scion], "polar", None),
]
CASES = [(cls, key, value) for classes, key, value in WRONG for cls in classes]


@pytest.mark.parametrize(("cls", "key", "value"), CASES)
def test_values_out_of_range_are_named_everywhere(cls, key, value):
    def weights():
        return [nn.Parameter(torch.ones(4, 3))]

    def good():
        optimizer = cls(weights())
        optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 3)
        return optimizer

    with raises_naming(ValueError, key):
        cls(weights(), **{key: value})
    with raises_naming(ValueError, key):
        cls([{"params": weights(), key: value}])
    saved = copy.deepcopy(good().state_dict())
    saved["param_groups"][0][key] = value
    optimizer = good()
    with raises_naming(ValueError, key):
        optimizer.load_state_dict(saved)
    optimizer.step()  # nothing was loaded
    if key != "lr":
        optimizer.param_groups[0][key] = value
        with raises_naming(ValueError, key):
            optimizer.step()


def test_groups_are_read_like_constructors():
    def group(cls=Muon, **settings):
        optimizer = cls([{"params": [nn.Parameter(torch.ones(4, 3))], **settings}])
        return optimizer.param_groups[0]

    assert group(conv1d="no")["conv1d"] is False and group(split=2.0)["split"] == 2
    assert group(Scion, constrained=False)["weight_decay"] == 0.0
    assert group(name="mine", initial_lr=0.1)["name"] == "mine"
    for settings, words in [
        ({"splitt": 3}, ("splitt=3", "split?")),
        ({"split": 0}, ("split=0", "at least 1")),
        ({"split": "x"}, ("split=x", "whole number")),
        ({"conv1d": "maybe"}, ("conv1d=maybe", "true or false")),
        ({"eps": 1e-8}, ("eps=1e-08", "Muon")),
    ]:
        with raises_naming(ValueError, *words):
            group(**settings)
    with raises_naming(ValueError, "weight_decay=0.1", "AdagradInside"):
        group(AdagradInside, weight_decay=0.1)
    with raises_naming(ValueError, "weight_decay=0.5", "constrained"):
        group(Scion, weight_decay=0.5)
    assert Muon([nn.Parameter(torch.ones(4, 3))], nesterov="off").param_groups[0]["nesterov"] is False


def test_an_old_checkpoint_gets_defaults_for_what_it_lacks_and_no_unknown_keys():
    optimizer = Muon([nn.Parameter(torch.ones(4, 3))], momentum=0.8)
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("split", "stack", "cautious", "momentum"):
        del saved["param_groups"][0][key]
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["split"], group["stack"], group["cautious"], group["momentum"]) == (1, None, False, 0.8)
    saved["param_groups"][0]["momentm"] = 0.9
    with raises_naming(ValueError, "momentm=0.9", "momentum?"):
        optimizer.load_state_dict(saved)
    copied = copy.deepcopy(Lion([nn.Parameter(torch.ones(3))]))
    copied.param_groups[0]["params"][0].grad = torch.ones(3)
    copied.step()


def test_the_container_loads_counters_and_leaves_settings():
    optimizers = build_from_config(nn.Linear(4, 3, bias=False), {"matrix": {"_target_": "optim.Muon"}})
    load_named(optimizers, {}, {"matrix/0/momentum": 1.5, "matrix/0/step": 7})
    (group,) = optimizers.members["matrix"].param_groups
    assert (group["momentum"], group["step"]) == (0.95, 7)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"comm_dtype": torch.int8}, ("comm_dtype=torch.int8", "float32")),
        ({"dtype": torch.complex64}, ("dtype=torch.complex64", "float32")),
        ({"dtype": "bfloat16"}, ("dtype=bfloat16", "torch.bfloat16")),
        ({"dtype": torch.float8_e4m3fn}, ("dtype=torch.float8_e4m3fn", "bfloat16")),
        *(({"bucket_bytes": value}, (f"bucket_bytes={value}", "at least 1")) for value in (-1, 0, True, "1", NAN, INF)),
        ({"process_group": "world"}, ("process_group=world", "ProcessGroup")),
    ],
)
def test_what_the_engine_cannot_work_with_is_named(settings, words):
    """Factors sent as int8 were zeros, and no weight moved."""
    with raises_naming(ValueError, *words):
        Muon([nn.Parameter(torch.ones(2, 3))], lr=0.1, **settings)
