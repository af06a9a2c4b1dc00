"""A folder that transformers reads: weights, config, tokenizer, generation settings, model card.

GPT-2's architecture goes as GPT2LMHeadModel. Another GPT goes with its own modelling code, copies of trainer/model.py
and what it needs, which whoever loads it has to trust: ``from_pretrained(folder, trust_remote_code=True)``.
"""

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from common import write_json, write_text
from trainer.metrics.jsonl import FILE, read_lines
from trainer.model import GPTConfig
from trainer.run.hf_tokenizer import fast_tokenizer
from trainer.run.huggingface import check_gpt2, hf_config, to_hf
from trainer.run.weights import Trained

TRAINER = Path(__file__).resolve().parents[1]
MODELLING = '''"""nanoMuon's GPT for transformers, written by its scripts/export.py; model.py is nanoMuon's own."""

from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import GPT, GPTConfig


class NanoMuonConfig(PretrainedConfig):
    model_type = "nanomuon"

    def __init__(self, model=None, vocab_size=257, seq_len=128, document_start=None, **settings):
        self.model, self.vocab_size = model or {}, vocab_size
        self.seq_len, self.document_start = seq_len, document_start
        super().__init__(**settings)


class NanoMuonForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoMuonConfig

    def __init__(self, config: NanoMuonConfig):
        super().__init__(config)
        self.model = GPT(GPTConfig(**config.model), config.vocab_size, config.seq_len, config.document_start)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_):
        return {"input_ids": input_ids}  # padding lies on the right, where a causal model does not look

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_
    ) -> CausalLMOutput:
        logits = self.model(input_ids)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
'''
BASE = '''"""What nanoMuon's model.py needs of the trainer."""

from dataclasses import dataclass

from torch import Tensor, nn

IGNORE_INDEX = -100


def document_ids(tokens: Tensor, start: int) -> Tensor:
    return (tokens == start).cumsum(dim=1)


def _initial_values(*_):
    raise NotImplementedError("initial values are the trainer's")


init_tensor = init_generator = _initial_values


def recomputed(_, function, *inputs):
    return function(*inputs)


@dataclass
class ModelConfig:
    _target_: str = "trainer.model.GPT"
    name: str = ""
    family: str = "custom"
    presets: str | None = None


class LanguageModel(nn.Module):
    def __init__(self, config, vocab_size: int, seq_len: int, document_start: int | None = None):
        super().__init__()
        config.check()
        self.config, self.vocab_size, self.seq_len, self.document_start = config, vocab_size, seq_len, document_start
'''


def write_hf_folder(trained: Trained, out: Path) -> None:
    """Raises ValueError: the tokenizer has no form there."""
    from transformers import GenerationConfig

    model, config = trained.model, trained.model.config
    assert isinstance(config, GPTConfig)
    eos = trained.tokenizer.eos
    tokenizer = fast_tokenizer(trained.tokenizer, model.seq_len)
    try:
        check_gpt2(config)
        weights = to_hf(model.state_dict(), config, model.vocab_size)
        del weights["lm_head.weight"]  # the same tensor as wte's
        theirs, own_code = hf_config(config, model.vocab_size, model.seq_len, eos).to_dict(), False
    except ValueError:
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        theirs, own_code = own_config(trained, config), True
    out.mkdir(parents=True, exist_ok=True)
    save_weights(weights, {"format": "pt"}, out / "model.safetensors")
    write_json(out / "config.json", theirs)
    for name, text in (modelling_code() if own_code else {}).items():
        write_text(out / name, text)
    tokenizer.save_pretrained(out)
    # top_k=0: none, where transformers' own default is 50
    drawing = {"do_sample": True, "temperature": 0.8, "top_k": 0, "use_cache": not own_code}
    GenerationConfig(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos, **drawing).save_pretrained(out)
    write_text(out / "README.md", model_card(trained, own_code))


def own_config(trained: Trained, config: GPTConfig) -> dict[str, Any]:
    model, eos = trained.model, trained.tokenizer.eos
    code = "modeling_nanomuon.NanoMuon"
    return {
        "model_type": "nanomuon", "architectures": ["NanoMuonForCausalLM"], "dtype": "float32",
        "auto_map": {"AutoConfig": f"{code}Config", "AutoModelForCausalLM": f"{code}ForCausalLM"},
        "model": asdict(config), "vocab_size": model.vocab_size, "seq_len": model.seq_len,
        "document_start": model.document_start, "num_hidden_layers": config.n_layer,
        "hidden_size": config.n_embd, "num_attention_heads": config.n_head, "use_cache": False,
        "bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos,
    }  # fmt: skip


def modelling_code() -> dict[str, str]:
    """Name -> text of the files that make the model, which import each other and torch alone."""
    files = {"modeling_nanomuon.py": MODELLING, "base.py": BASE}
    wanted = ["model"]
    for name in wanted:
        text = (TRAINER / f"{name}.py").read_text(encoding="utf-8")
        text = re.sub(r"^from (trainer\.language_model|data) import", "from .base import", text, flags=re.M)
        wanted += [other for other in re.findall(r"^from trainer\.(\w+) import", text, re.M) if other not in wanted]
        files[f"{name}.py"] = re.sub(r"^from trainer\.(\w+) import", r"from .\1 import", text, flags=re.M)
    return files


def model_card(trained: Trained, own_code: bool) -> str:
    """README.md: how to load it, its settings, its curve."""
    settings, run = trained.settings, trained.folder.parent.parent
    parameters = sum(p.numel() for p in trained.model.parameters())
    trust = ", trust_remote_code=True" if own_code else ""
    lines = [line for line in read_lines(run / FILE) if line.get("val/loss") is not None]
    lines = [line for line in lines if line.get("step", 0) <= trained.step]
    shown = lines[:: max(1, len(lines) // 16)] + lines[-1:] if lines else []
    curve = dict.fromkeys(f"| {line['step']} | {line['tokens']} | {line['val/loss']:.4f} |" for line in shown)
    table = "\n".join(f"| `{key}` | {value} |" for key, value in sorted(settings.items()) if _is_told(key, value))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {settings.get("run.name") or settings.get("model.name")}

A GPT trained by nanoMuon, after update {trained.step}: {parameters:,} parameters. Text begins with the token
`<|endoftext|>`, which the tokenizer adds.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=50)[0]))
```

| step | tokens | validation loss, nats a token |
|---|---|---|
{chr(10).join(curve)}

| setting | value |
|---|---|
{table}
"""


def _is_told(key: str, value: Any) -> bool:
    """Settings that made the weights; no folders of anybody's machine."""
    return key.split(".")[0] in ("seed", "model", "optim", "schedule", "train", "data") and value is not None and (
        key not in ("data.dir", "data.source", "data.workers", "data.download")
    )  # fmt: skip


def save_weights(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """The whole file under its name, or none."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
