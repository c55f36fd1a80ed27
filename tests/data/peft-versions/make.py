"""Adapters that real versions of PEFT wrote, with what those versions computed with them.

The files beside this one hold, for each version and case, the folder that `save_pretrained` wrote, and in
`expected.safetensors` the outputs of the adapted model and of the merged one. All numbers come from `numbers`, so that
base weights and inputs need no files, and are the same under every version of PyTorch. This script runs under the
version itself, and knows neither lorank nor what has become of PEFT since:

    pip install --no-deps --target .venv/apart-peft-0.3.0 peft==0.3.0
    pip install --no-deps --target .venv/apart-peft-with-4.30 transformers==4.30.2 tokenizers==0.13.3 \\
        accelerate==0.20.3 huggingface_hub==0.16.4 numpy==1.26.4 safetensors==0.4.5 setuptools==69.5.1 \\
        requests urllib3 regex
    PYTHONPATH=.venv/apart-peft-0.3.0:.venv/apart-peft-with-4.30 python tests/data/peft-versions/make.py

PEFT up to 0.4 runs with these (0.1 wants `bitsandbytes` too, to import it), up to 0.13 with transformers 4.40.2,
tokenizers 0.19.1, accelerate 0.30.1 and huggingface_hub 0.23.4, later ones with transformers 4.57.1, tokenizers 0.22.1,
accelerate 1.10.1 and huggingface_hub 0.36.0. Names of cases as arguments make these alone.
"""

import shutil
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return numbers in ±0.5 that depend on a name and a shape alone, exact in float32."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    mixed = (index * index * 31 + index * 17 + zlib.crc32(name.encode()) % 1009) % 1009
    return (mixed.double() / 1024 - 0.5).float().view(shape)


class Config(dict[str, Any]):
    """What versions of PEFT look for in the configuration of a model that is none of transformers'."""

    model_type, tie_word_embeddings, _name_or_path = "custom", False, None

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Layers(nn.Module):
    """An embedding, linear layers with and without bias, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config(model_type="custom", _name_or_path=None)
        self.emb = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.emb(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class Convolutions(nn.Module):
    """A convolution in one or two dimensions, with or without groups."""

    def __init__(self, dimensions: int = 2, groups: int = 1):
        super().__init__()
        self.config = Config(model_type="custom", _name_or_path=None)
        self.dimensions = dimensions
        kind = nn.Conv2d if dimensions == 2 else nn.Conv1d
        self.conv = kind(4, 6, 3, padding=1, stride=2, groups=groups)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = numbers("image", (2, 4, *[7] * self.dimensions))
        return self.head(torch.tanh(self.conv(x)).flatten(2).mean(-1))


class Experts(nn.Module):
    """Two stacks of matrices, (experts, in, out) where the module says `is_transposed`, else (experts, out, in)."""

    def __init__(self, inner: int, transposed: bool, experts: int):
        super().__init__()
        self.is_transposed = transposed
        up, down = (experts, 4, inner), (experts, inner, 4)
        self.up = nn.Parameter(torch.empty(up if transposed else (experts, inner, 4)))
        self.down = nn.Parameter(torch.empty(down if transposed else (experts, 4, inner)))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return (torch.tanh(x @ up) @ down).sum(0)


class Mixture(nn.Module):
    def __init__(self, inner: int, transposed: bool, experts: int = 3):
        super().__init__()
        self.config = Config(model_type="custom", _name_or_path=None)
        self.lin = nn.Linear(4, 4)
        self.experts = Experts(inner, transposed, experts)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.experts(self.lin(numbers("hidden", (1, 5, 4))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config(model_type="custom", _name_or_path=None)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = numbers("sequence", (2, 5, 6))
        return self.fc(self.attn(x, x, x)[0])


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=6, n_layer=1, n_head=2, n_inner=8, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(sizes)


MODELS = {
    "layers": Layers,
    "gpt2": gpt2,
    "conv": Convolutions,
    "conv1d": lambda: Convolutions(1),
    "grouped": lambda: Convolutions(2, 2),
    "attention": Attention,
    "square-transposed": lambda: Mixture(4, True),
    "square": lambda: Mixture(4, False),
    "oblong-transposed": lambda: Mixture(6, True),
    "oblong": lambda: Mixture(6, False),
    "lone-transposed": lambda: Mixture(4, True, 1),
    "lone": lambda: Mixture(4, False, 1),
}


@dataclass(frozen=True)
class Case:
    """A model, and how PEFT adapts it."""

    model: str
    settings: dict[str, Any]
    config: str = "LoraConfig"
    common: dict[str, Any] = field(default_factory=lambda: {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0})


def _experts(model: str, *names: str) -> Case:
    return Case(model, {"target_modules": ["lin"], "target_parameters": [f"experts.{name}" for name in names]})


_LAYERS = ["up", "down"]
_TWO_PATTERNS = {"rank_pattern": {"up": 3}, "alpha_pattern": {"blocks.0.up": 5, "down": 7}}
CASES = {
    "plain": Case("layers", {"target_modules": _LAYERS}),
    "head": Case("layers", {"target_modules": _LAYERS, "modules_to_save": ["head"]}),
    "embedding": Case("layers", {"target_modules": ["emb", "up"]}),
    "bias-all": Case("layers", {"target_modules": ["up"], "bias": "all", "modules_to_save": ["head"]}),
    "bias-of-adapted": Case("layers", {"target_modules": _LAYERS, "bias": "lora_only"}),
    "conv": Case("conv", {"target_modules": ["conv", "head"]}),
    "conv1d": Case("conv1d", {"target_modules": ["conv"]}),
    "conv-in-groups": Case("grouped", {"target_modules": ["conv"]}),
    "gpt2": Case("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-bias-all": Case("gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True, "bias": "all"}),
    "gpt2-embedding": Case("gpt2", {"target_modules": ["wte"]}),
    "parts": Case("gpt2", {"target_modules": ["c_attn"], "enable_lora": [True, False, True], "fan_in_fan_out": True}),
    "parts-of-linear": Case("layers", {"target_modules": ["head"]}),  # one layer alone was taken for q, k and v
    "merged-weights": Case("layers", {"target_modules": _LAYERS, "merge_weights": True}),
    "patterns": Case("layers", {"target_modules": _LAYERS, "rank_pattern": {"up": 3}, "alpha_pattern": {"up": 5}}),
    "two-patterns": Case("layers", {"target_modules": _LAYERS, **_TWO_PATTERNS}),
    "rank-stabilised": Case("layers", {"target_modules": _LAYERS, "use_rslora": True}),
    "dora": Case("layers", {"target_modules": _LAYERS, "use_dora": True}),
    "dora-gpt2": Case("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "dora-conv": Case("conv", {"target_modules": ["conv"], "use_dora": True}),
    "dora-embedding": Case("layers", {"target_modules": ["emb"], "use_dora": True}),
    "bias-of-update": Case("layers", {"target_modules": _LAYERS, "lora_bias": True}),
    "tokens": Case("layers", {"target_modules": ["up"], "trainable_token_indices": {"emb": [1, 4]}}),
    "attention": Case("attention", {"target_modules": ["attn"]}),
    **{f"experts-{model}": _experts(model, "up", "down") for model in MODELS if "square" in model or "oblong" in model},
    **{f"experts-{model}": _experts(model, "up") for model in MODELS if "lone" in model},
    "adalora": Case(
        "layers", {"target_modules": _LAYERS, "init_r": 3, "target_r": 2, "total_step": 9}, "AdaLoraConfig"
    ),
    "loha": Case("layers", {"target_modules": _LAYERS, "r": 2, "alpha": 3}, "LoHaConfig", common={}),
    "lokr": Case("layers", {"target_modules": _LAYERS, "r": 2, "alpha": 3}, "LoKrConfig", common={}),
    "vera": Case("layers", {"target_modules": ["up"], "r": 2}, "VeraConfig", common={}),
}

_EXPERTS = tuple(name for name in CASES if name.startswith("experts"))
CASES_OF = {
    "0.1.0": ("plain", "head", "parts", "merged-weights", "bias-of-adapted"),
    "0.2.0": ("plain", "parts", "parts-of-linear"),
    "0.3.0": ("plain", "head", "embedding", "bias-all", "bias-of-adapted", "gpt2", "gpt2-bias-all"),
    "0.4.0": ("conv",),
    "0.5.0": ("bias-all", "adalora"),
    "0.6.2": ("patterns", "two-patterns", "bias-of-adapted", "loha", "lokr", "gpt2-embedding"),
    "0.7.1": ("plain", "head", "bias-of-adapted", "conv-in-groups"),
    "0.9.0": ("dora", "rank-stabilised"),
    "0.10.0": ("dora",),
    "0.11.1": ("dora", "dora-conv", "dora-gpt2", "vera"),
    "0.13.2": ("embedding", "two-patterns", "lokr", "dora-embedding"),
    "0.14.0": ("two-patterns", "lokr", "bias-of-update"),
    "0.15.2": ("attention", "tokens", "conv1d", "conv-in-groups"),
    "0.16.0": ("embedding", "conv-in-groups"),
    "0.17.1": ("attention", *_EXPERTS),
    "0.18.1": _EXPERTS,
    "0.19.0": _EXPERTS,
    "0.19.1": _EXPERTS,
    "0.20.0": ("bias-of-adapted", "experts-square"),
    "0.21.2": ("plain", "bias-of-adapted", "attention", "experts-square"),
}


def build(name: str) -> nn.Module:
    """Return a model with its weights, in eval mode."""
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(numbers(key, tuple(parameter.shape)))
    return model


def output(model: nn.Module) -> Tensor:
    """Return what a model computes with the one input."""
    ids = torch.arange(10).view(2, 5) % 11
    with torch.no_grad():
        found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


def train(model: nn.Module) -> None:
    """Put numbers into all that is trained."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = numbers(name, tuple(parameter.shape))
            if not parameter.requires_grad or "original_module" in name:
                continue
            if "magnitude" in name:
                parameter.mul_(1 + 0.5 * values)
            elif any(kind in name for kind in ("lora_", "hada_", "lokr_", "vera_lambda")):
                parameter.copy_(values)
            else:
                parameter.add_(0.4 * values)


def make(name: str, case: Case, folder: Path) -> None:
    """Write one case with the PEFT that is installed."""
    import peft
    from safetensors.torch import save_file

    config = getattr(peft, case.config)(**case.common, **case.settings)
    model = peft.get_peft_model(build(case.model), config)
    train(model)
    model.eval()
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder))
    expected = {"output": output(model).clone()}
    try:
        expected["merged"] = output(model.merge_and_unload()).clone()
    except Exception as error:  # many had no merging, or not of all layers
        print(f"{peft.__version__} {name}: not merged ({type(error).__name__}: {error})")
    (folder / "README.md").unlink(missing_ok=True)
    save_file({key: value.contiguous() for key, value in expected.items()}, str(folder / "expected.safetensors"))


def main(wanted: list[str]) -> None:
    """Write the cases of the version that is installed, or those that are named."""
    import peft

    target = HERE / peft.__version__
    for name in wanted or CASES_OF[peft.__version__]:
        make(name, CASES[name], target / name)


if __name__ == "__main__":
    main(sys.argv[1:])
