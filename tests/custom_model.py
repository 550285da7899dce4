"""A checkpoint whose model is made of code that lies beside it, as a test writes it: a mean of what came before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIGURATION = """from pathlib import Path

from transformers import PretrainedConfig

with (Path({mark!r})).open("a") as file:
    file.write(__name__)


class TinyConfig(PretrainedConfig):
    model_type = "tiny_of_its_own"

    def __init__(self, vocab_size=64, width=16, num_hidden_layers=2, tie_word_embeddings=False, **more):
        self.vocab_size, self.width, self.num_hidden_layers = vocab_size, width, num_hidden_layers
        super().__init__(tie_word_embeddings=tie_word_embeddings, **more)
"""
MODELING = """import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .configuration_tiny import TinyConfig
from .mixing_tiny import TinyAttention


class TinyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(config.width), TinyAttention(config.width)
        self.up, self.down = nn.Linear(config.width, 2 * config.width), nn.Linear(2 * config.width, config.width)

    def forward(self, x):
        x = x + self.mixer(self.norm(x))
        return x + self.down(torch.relu(self.up(x)))


class TinyModel(PreTrainedModel):
    config_class, base_model_prefix = TinyConfig, "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(TinyBlock(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, **more):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)


class TinyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class, base_model_prefix = TinyConfig, "model"

    def __init__(self, config):
        super().__init__(config)
        self.model, self.lm_head = TinyModel(config), nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids=None, attention_mask=None, labels=None, **more):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))
"""
MIXING = '''import torch
from torch import nn


class TinyAttention(nn.Module):
    """The same attention to all that came before."""

    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        return self.proj(x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None])
'''
TOKENIZATION = """from pathlib import Path

from transformers import PreTrainedTokenizerFast

with (Path({mark!r})).open("a") as file:
    file.write(__name__)


class TinyTokenizer(PreTrainedTokenizerFast):
    def shout(self, text):
        return self(text.upper(), add_special_tokens=False)["input_ids"]
"""
MAP = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
WIDTH, BLOCKS = 16, 2


def write(folder: Path, tokenizer: Any, *, seed: int = 0, own_tokenizer: bool = False) -> Path:
    """The checkpoint. Its configuration, and its tokenizer, leave their names in the file `FOLDER.ran` when they run."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    shapes = {"model.embed.weight": (len(tokenizer), WIDTH), "lm_head.weight": (len(tokenizer), WIDTH)}
    for block in (f"model.layers.{number}" for number in range(BLOCKS)):
        shapes |= {f"{block}.norm.weight": (WIDTH,), f"{block}.norm.bias": (WIDTH,)}
        for name, out, into in (("mixer.proj", WIDTH, WIDTH), ("up", 2 * WIDTH, WIDTH), ("down", WIDTH, 2 * WIDTH)):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
    weights = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    fields = {
        "model_type": "tiny_of_its_own",
        "vocab_size": len(tokenizer),
        "width": WIDTH,
        "num_hidden_layers": BLOCKS,
    }
    fields |= {"architectures": ["TinyForCausalLM"], "auto_map": MAP}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "configuration_tiny.py").write_text(CONFIGURATION.format(mark=str(mark(folder))))
    (folder / "modeling_tiny.py").write_text(MODELING)
    (folder / "mixing_tiny.py").write_text(MIXING)
    (folder / "convert.py").write_text("raise SystemExit('nobody asks for this file')\n")
    if own_tokenizer:
        give_tokenizer(folder)
    return folder


def give_tokenizer(folder: Path) -> None:
    """Let the tokenizer of a folder be of code beside it."""
    (folder / "tokenization_tiny.py").write_text(TOKENIZATION.format(mark=str(mark(folder))))
    path = folder / "tokenizer_config.json"
    facts = json.loads(path.read_text()) | {"tokenizer_class": "TinyTokenizer"}
    path.write_text(json.dumps(facts | {"auto_map": {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizer"]}}))


def mark(folder: Path) -> Path:
    """The file in which code of the folder says that it ran."""
    return folder.with_name(f"{folder.name}.ran")


def ran(folder: Path) -> bool:
    """Whether code of the folder ran since this was last asked."""
    path = mark(folder)
    there = path.exists()
    path.unlink(missing_ok=True)
    return there


def copied(folder: Path, to: Path) -> Path:
    """A copy of the checkpoint with marks of its own."""
    shutil.copytree(folder, to)
    for path in to.glob("*.py"):
        path.write_text(path.read_text().replace(str(mark(folder)), str(mark(to))))
    return to
