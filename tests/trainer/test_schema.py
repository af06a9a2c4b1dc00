"""The typed configuration: what composes, what is derived, what is refused and how."""

import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from common import UserError
from tests.errors import raises_naming
from trainer.config import Config, Dtype, by_family, fit_batch, register, validate
from trainer.language_model import ModelConfig, model_class
from trainer.launch import cli, load_config
from trainer.model import GPTConfig

SMOKE = "experiment=smoke"


def choices(group):
    return sorted(path.stem for path in (cli.CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes(configure, experiment):
    configure(f"experiment={experiment}")


@pytest.mark.parametrize("model", [model for model in choices("model") if model != "custom"])
def test_every_model_composes(configure, model):
    assert configure(f"model={model}").model.name == model


@pytest.mark.parametrize("schedule", choices("schedule"))
def test_every_schedule_composes(configure, schedule):
    assert configure(f"schedule={schedule}").schedule.name == schedule


@pytest.mark.parametrize("optim", choices("optim"))
@pytest.mark.parametrize("model", ["tiny", "gpt2_124m", "modern_124m"])
def test_every_optimizer_has_settings_for_every_family(configure, optim, model):
    drawn = ["model.zero_init_proj=false"] if optim in ("adamh", "muonh") and model == "modern_124m" else []
    config = configure(f"optim={optim}", f"model={model}", *drawn)
    assert config.optim.name == optim
    for role in ("matrix", "embedding", "head", "scalar"):
        assert isinstance(getattr(config.optim, role)["lr"], float | int)


@pytest.mark.parametrize(
    "overrides", [["optim=adamh"], ["optim.matrix.constraint=hyperball", "optim.matrix.weight_decay=0"]]
)
def test_norms_are_not_kept_at_zero(configure, overrides):
    with raises_naming(UserError, "model.zero_init_proj=true", "model.zero_init_proj=false"):
        configure("model=modern_124m", *overrides)


def test_the_main_job(configure):
    config = configure()
    assert (config.model.name, config.data.name, config.optim.name) == ("gpt2_124m", "fineweb", "muon")
    assert (config.train.batch_tokens, config.train.seq_len, config.run.name) == (
        524288,
        1024,
        "muon-gpt2_124m-fineweb-s0",
    )


def test_family_values_are_chosen_and_overridden(configure):
    def lr(*overrides):
        return configure(SMOKE, "optim=muon", *overrides).optim.matrix["lr"]

    preset = OmegaConf.load(cli.CONFIGS / "optim" / "muon.yaml").matrix.lr
    assert len({preset.tiny, preset.gpt2, preset.modern}) == 3
    assert lr() == preset.tiny and lr("model=gpt2_124m") == preset.gpt2 and lr("model=modern_124m") == preset.modern
    assert lr("optim.matrix.lr=0.123") == 0.123


def test_family_without_a_value_takes_that_of_its_presets():
    settings = {"lr": {"gpt2": 0.1, "tiny": 0.2}, "betas": [0.9, 0.95]}
    assert by_family(settings, "gpt2", "optim.head") == {"lr": 0.1, "betas": [0.9, 0.95]}
    assert by_family(settings, "mine", "optim.head", presets="tiny")["lr"] == 0.2
    assert by_family(settings, "gpt2", "optim.head", presets="tiny")["lr"] == 0.1
    expected = ["optim.head.lr has", "gpt2, tiny", "model.family=mine", "optim.head.lr.mine=", "model.presets=gpt2"]
    for presets in (None, "modern"):
        with raises_naming(UserError, *expected):
            by_family(settings, "mine", "optim.head", presets)


def test_a_family_of_ones_own_is_one_file(configure, tmp_path):
    (tmp_path / "model").mkdir()
    text = "family: mine\npresets: modern\nname: mine_8m\nn_layer: 3\ninit: gpt2\n"
    (tmp_path / "model" / "mine_8m.yaml").write_text(text)
    preset = OmegaConf.load(cli.CONFIGS / "optim" / "muon.yaml").matrix.lr
    words = [SMOKE, "optim=muon", "model=mine_8m", f"hydra.searchpath=[{tmp_path}]"]
    config = configure(*words)
    assert (config.model.name, config.model.n_layer, config.optim.matrix["lr"]) == ("mine_8m", 3, preset.modern)
    assert configure(*words, "optim.matrix.lr.mine=0.5").optim.matrix["lr"] == 0.5
    assert configure(*words, "model.presets=tiny").optim.matrix["lr"] == preset.tiny


def test_saved_config_composes_to_itself(configure):
    """What config.yaml holds is plain: no family tables, no enums, nothing left to derive."""
    config = configure(SMOKE)
    saved = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))
    again = validate(OmegaConf.merge(OmegaConf.structured(Config), saved), 1)
    assert asdict(again) == asdict(config)


def test_dtype_follows_the_device(configure, monkeypatch):
    monkeypatch.setattr("trainer.config.device_memory", lambda: None)
    for cuda, expected in ((False, Dtype.float32), (True, Dtype.bfloat16)):
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        assert configure(SMOKE).train.dtype == expected
    assert configure(SMOKE, "train.dtype=float64").train.dtype == Dtype.float64


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_smoke_batch_divides(configure, ranks):
    config = configure(SMOKE, world_size=ranks)
    assert config.train.batch_tokens // config.train.seq_len % (ranks * config.train.micro_batch) == 0


def settings(batch_tokens, seq_len, micro_batch=None, **model):
    train = SimpleNamespace(batch_tokens=batch_tokens, seq_len=seq_len, micro_batch=micro_batch, dtype=Dtype.float32)
    return SimpleNamespace(train=train, model=GPTConfig(**model))


@given(
    st.integers(1, 5000),
    st.sampled_from([1, 8, 12]),
    st.none() | st.integers(1, 9),
    st.integers(1, 7),
    st.integers(1, 5000),
)
def test_batch_divides_or_the_proposals_do(batch_tokens, seq_len, micro_batch, ranks, width):
    config = settings(batch_tokens, seq_len, micro_batch, n_embd=width * 1000)
    try:
        fit_batch(config, ranks)
    except UserError as error:
        proposals = [int(word) for word in str(error).split("nearest ")[1].split(", or train")[0].split(" or ")]
        assert str(batch_tokens) in str(error) and proposals
        for proposal in proposals:
            assert proposal % seq_len == 0
            if "ranks" in str(error):
                fit_batch(settings(proposal, seq_len, micro_batch), ranks)
    else:
        unit = ranks * config.train.micro_batch * seq_len
        assert batch_tokens % unit == 0 and config.train.micro_batch == (micro_batch or config.train.micro_batch)


def test_micro_batch_shrinks_with_the_model():
    chosen = []
    for layers, width in ((4, 128), (12, 768), (48, 1600)):
        config = settings(64 * 1024, 1024, n_layer=layers, n_embd=width)
        fit_batch(config, 1)
        chosen.append(config.train.micro_batch)
    assert chosen == sorted(chosen, reverse=True) and chosen[0] > chosen[1] > chosen[2] == 1
    config = settings(64 * 1024, 1024)
    config.model = ModelConfig()  # a model that estimates nothing
    fit_batch(config, 2)
    assert config.train.micro_batch == 32


BAD = {
    "train.stepz=3": ["train.stepz=3", "train.steps?"],
    "steps=3": ["steps=3", "train.steps?"],
    "train.steps=abc": ["train.steps=abc", "a whole number"],
    "train.steps=1.5": ["train.steps=1.5", "a whole number"],
    "train.steps=0": ["train.steps=0", "above 0"],
    "train.clip=-1": ["train.clip=-1", "above 0"],
    "train.dtype=float31": ["train.dtype=float31", "did you mean float32"],
    "train=3": ["train=3", "section", "train.steps"],
    "run.resume=maybe": ["run.resume=maybe", "auto, never, must"],
    "optim=muonn": ["optim=muonn", "did you mean optim=muon?", "adamw"],
    "optimm=muon": ["optimm=muon", "did you mean optim?"],
    "experiment=smok": ["experiment=smok", "experiment=smoke?"],
    "optim.matrx.lr=1": ["optim.matrx.lr=1", "optim.matrix?"],
    "optim.matrix=adam": ["optim.matrix=adam", "section"],
    "optim.matrix.momentm=0.9": ["optim.matrix.momentm=0.9", "did you mean momentum?"],
    "optim.matrix.momentum=1.5": ["optim.matrix", "momentum=1.5"],
    "optim.matrix.lr=abc": ["optim.matrix.lr=abc", "a number"],
    "optim.head._target_=torch.optim.AdamV": ["optim.head._target_=torch.optim.AdamV", "no such class"],
    "train.batch_tokens=3000": ["train.batch_tokens=3000", "2944 or 3072"],
    "train.micro_batch=7": ["train.batch_tokens=3072", "train.micro_batch=7", "2688 or 3584", "6, 8, 12, 24"],
    "eval.tokens=100": ["eval.tokens=100", "nearest 128"],
    "schedule.warmup=500": ["schedule.warmup of 500", "train.steps=400"],
    "schedule.name=linear": ["schedule.name=linear", "warmdown"],
    "model.n_head=7": ["model.n_head=7", "model.n_embd=128"],
    "model.n_head=256": ["model.n_head=256", "128"],
    "model.n_layers=7": ["model.n_layers=7", "model.n_layer?"],
    "model.width=7": ["model.width=7", "GPT has", "n_embd"],
    "model.n_head=x": ["model.n_head=x", "a whole number"],
    "model.family=mine": ["optim.matrix.lr", "model.family=mine", "model.presets=tiny"],
    "n_embd=64": ["n_embd=64", "model.n_embd?"],
    "model=custom": ["model._target_", "no value", "set model._target_="],
    "parallel=fsdp": ["fsdp", "torchrun"],
    "parallel=hsdp": ["hsdp", "factors"],
    "data=shards": ["data.dir"],
    "+foo=3": ["foo=3", "no such key"],
    "+train.foo=3": ["train.foo=3", "no such key"],
    "~train.steps": ["train.steps", "cannot be removed"],
    "foo=[": ["foo=["],
    "seed=1,2": ["seed=1,2", "--multirun"],
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input_is_one_line_with_key_value_and_mend(override):
    register()
    with raises_naming(UserError, *BAD[override]):
        cli.compose_jobs([SMOKE, cli.to_hydra(override)])


def test_five_ranks_cannot_share_the_smoke_batch(configure):
    with raises_naming(UserError, "train.batch_tokens=3072", "5 ranks", "2560 or 3200"):
        configure(SMOKE, world_size=5)


def test_hsdp_needs_a_number_that_factors(configure):
    configure(SMOKE, "parallel=hsdp", world_size=4)
    with raises_naming(UserError, "hsdp", "not 3"):
        configure(SMOKE, "parallel=hsdp", world_size=3)


@pytest.mark.parametrize("override", ["optim.matrix.cautious=true", "model.qk_norm=true", "model.presets=tiny"])
def test_settings_that_the_preset_does_not_list_can_be_given(override):
    register()
    assert cli.compose_jobs([SMOKE, cli.to_hydra(override)]) is None


# --- a model of one's own ---

OWN = """
from dataclasses import dataclass, field
from trainer.language_model import LanguageModel, ModelConfig

@dataclass
class Expert:
    width: int = 4

@dataclass
class MixerConfig(ModelConfig):
    presets: str = "tiny"
    depth: int = 2
    expert: Expert = field(default_factory=Expert)
    def check(self):
        if self.depth < 1:
            raise ValueError(f"model.depth={self.depth}: give 1 or more")

class Mixer(LanguageModel):
    Config = MixerConfig
    def forward(self, tokens, targets): ...
    def init_parameter(self, name, seed): ...
    def flops_per_token(self): return 1.0

class Unfinished(LanguageModel):
    Config = MixerConfig

class NoConfig(Mixer):
    Config = dict

class Undecorated(Mixer):
    class Config(ModelConfig):
        depth: int = 2

class Unreadable(Mixer):
    @dataclass
    class Config(ModelConfig):
        things: set[int] = field(default_factory=set)

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """``own("key=value")`` -> the config of a Mixer, whose module lies in the current folder and nowhere else."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / f"broken_{name}.py").write_text("x = 1\nundefined_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))

    def composed(*overrides, cls="Mixer", module=name):
        return load_config([SMOKE, "model=custom", f"model._target_={module}.{cls}", *overrides])

    composed.name = name
    return composed


def test_a_model_of_ones_own_has_keys_of_its_own(own, configure):
    config = own("model.depth=3", "model.expert.width=8")
    assert (type(config.model).__name__, config.model.depth, config.model.expert.width) == ("MixerConfig", 3, 8)
    assert config.model.name == "mixer" and config.run.name == "muon-mixer-sample-s0"
    assert config.train.micro_batch == config.train.batch_tokens // config.train.seq_len  # it estimates no memory
    assert config.optim.matrix["lr"] == configure(SMOKE).optim.matrix["lr"]


@pytest.mark.parametrize(("overrides", "words"), [
    (["model.dept=3"], ["model.dept=3", "model.depth?"]),
    (["model.n_layer=3"], ["model.n_layer=3", "Mixer has", "depth", "model=custom"]),
    (["model.depth=many"], ["model.depth=many", "a whole number"]),
    (["model.expert.width=x"], ["model.expert.width=x", "a whole number"]),
    (["model.depth=0"], ["model.depth=0", "1 or more"]),
    (["parallel.activation_checkpointing=true"], ["parallel.activation_checkpointing", "Mixer", "recompute", "off"]),
])  # fmt: skip
def test_settings_of_a_model_of_ones_own_are_typed(own, overrides, words):
    with raises_naming(UserError, *words):
        own(*overrides)


@pytest.mark.parametrize(("cls", "words"), [
    ("Mixr", ["has no Mixr", "did you mean Mixer?"]),
    ("number", ["number does not extend", "LanguageModel"]),
    ("Expert", ["Expert does not extend", "LanguageModel"]),
    ("Unfinished", ["no flops_per_token, forward, init_parameter", "add it"]),
    ("NoConfig", ["NoConfig.Config", "dataclass", "ModelConfig"]),
    ("Undecorated", ["Undecorated.Config", "dataclass", "ModelConfig"]),
    ("Unreadable", ["Config cannot be read", "set"]),
])  # fmt: skip
def test_a_class_that_cannot_be_trained_is_one_line(own, cls, words):
    with raises_naming(UserError, f"model._target_={own.name}.{cls}", *words):
        own(cls=cls)


def test_a_module_that_cannot_be_imported_is_one_line(own):
    for module, words in {
        "nowhere_at_all": ["No module named", "PYTHONPATH"],
        f"broken_{own.name}": ["NameError", "undefined_name", "line 2"],
    }.items():
        with raises_naming(UserError, f"model._target_={module}.Mixer", *words):
            own(module=module)
    with raises_naming(UserError, "model._target_=Mixer", "my_package"):
        model_class("Mixer")
