"""The peak of a training step as it is counted on the meta device, beside the peak of a real one.

    python -m benchmarks.memory --write docs/results/memory.md

Each case runs in a process of its own, on one thread: it counts, warms the libraries up with a tiny model, builds the
real model and trains three steps with `lorank.train`. What is measured is the most that the process had in the third
step beyond what it had before the model was built. On a CPU that is its resident memory, read from Linux, with every
block of 64 KiB and more given back as soon as it is freed (`mallopt`); with `--device cuda` it is the peak of PyTorch's
allocator.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import lorank
from lorank.accounting import training_costs
from lorank.models import attend_to_all, recompute_activations

_VOCABULARY = 8000
_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2 4 x 1024": {"family": "gpt2", "layers": 4, "width": 1024, "heads": 16},
    "roberta 6 x 768": {"family": "roberta", "layers": 6, "width": 768, "heads": 12},
    "llama 8 x 640": {"family": "llama", "layers": 8, "width": 640, "heads": 10},
}
_BATCHES = ((1, 512), (8, 128))  # rows, tokens
_METHODS: dict[str, Any] = {
    "full": None,
    "lora": lorank.LoRA(rank=8),
    "bitfit": lorank.BitFit(),
    "top-k": lorank.TopK(blocks=2),
    "adapter-h": lorank.AdapterH(size=64),
    "adapter-l": lorank.AdapterL(size=64),
    "adapter-p": lorank.AdapterP(size=64),
    "prefix-embedding": lorank.PrefixEmbedding(32, 8),
    "prefix-layer": lorank.PrefixLayer(8, 8),
}
_TARGETS = {"gpt2": ["c_attn[q,v]"], "roberta": ["query", "value"], "llama": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    shape: str
    method: str
    rows: int
    tokens: int
    dropout: float = 0.0
    dtype: str = "float32"
    checkpointing: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Found:
    """Bytes at the peak of a step."""

    counted: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.counted / self.measured


def cases(device: str) -> Iterator[Case]:
    """Yield what is measured."""
    for shape, sizes in _SHAPES.items():
        for method in _METHODS:
            if method != "bitfit" or sizes["family"] != "llama":  # which has no biases
                for rows, tokens in _BATCHES:
                    yield Case(shape, method, rows, tokens, device=device)
    for method in ("full", "lora", "adapter-h"):
        yield Case("gpt2 4 x 1024", method, 4, 384, dropout=0.1, device=device)
        yield Case("roberta 6 x 768", method, 4, 384, dropout=0.1, device=device)
        yield Case("llama 8 x 640", method, 4, 384, checkpointing=True, device=device)
        yield Case("llama 8 x 640", method, 4, 384, dtype="bfloat16", device=device)


def build(sizes: dict[str, Any], case: Case, device: str) -> tuple[Any, Any]:
    """Return a model with the method's adapter, in train mode, and what is trained."""
    family, layers, width, heads = sizes.values()
    torch.manual_seed(0)
    with torch.device(device):
        if family == "gpt2":
            drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), case.dropout)
            special = {"bos_token_id": 0, "eos_token_id": 0}
            model: Any = GPT2LMHeadModel(
                GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=_VOCABULARY, **special, **drop)
            )
        elif family == "roberta":
            drop = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), case.dropout)
            sized = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
            sized |= {"max_position_embeddings": 640, "intermediate_size": 4 * width}
            model = RobertaForSequenceClassification(RobertaConfig(**sized, vocab_size=_VOCABULARY, **drop))  # type: ignore[arg-type]
        else:
            sized = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
            model = LlamaForCausalLM(
                LlamaConfig(
                    **sized, num_key_value_heads=heads // 2, intermediate_size=3 * width, vocab_size=_VOCABULARY
                )
            )
    model.to(getattr(torch, case.dtype))
    if case.checkpointing:
        recompute_activations(model)
    spec = _METHODS[case.method]
    if spec is None:
        return model.train(), dict(model.named_parameters())
    targets = _TARGETS[family] if isinstance(spec, lorank.LoRA) else None
    lorank.adapt(model, spec, targets, train_also=["classifier"] if family == "roberta" else [])
    return model.train(), lorank.adapter_parameters(model)


def batch(model: Any, case: Case) -> Tensor:
    """Return ids (rows, tokens) on the model's device, with the special tokens of a prefix in front."""
    special = lorank.special_tokens(model)
    front = torch.arange(special.first, special.first + len(special)) if special else torch.empty(0, dtype=torch.long)
    text = torch.randint(_VOCABULARY, (case.rows, case.tokens))
    return torch.cat([front.expand(case.rows, -1), text], dim=1).to(model.device)


def loss(model: Any, ids: Tensor) -> Tensor:
    """Return the loss on a batch (rows, tokens); it is zero for the special tokens."""
    if not hasattr(model, "lm_head"):
        return nn.functional.cross_entropy(model(input_ids=ids).logits.float(), ids[:, -1] % 2)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    return nn.functional.cross_entropy(logits.float(), targets.where(targets < _VOCABULARY, -100))


def counted(case: Case) -> int:
    """Return the peak of a step as the meta device tells it."""
    model, _ = build(_SHAPES[case.shape], case, "meta")
    attend_to_all(model)
    ids = batch(model, case)
    return training_costs(model, lambda: loss(model, ids), device=case.device).memory.total


def measured(case: Case) -> int:
    """Return the peak of a real step; the process must be one in which little has run."""
    torch.set_num_threads(1)
    if case.device == "cpu":
        libc = ctypes.CDLL("libc.so.6")
        assert libc.mallopt(-3, 1 << 16) and libc.mallopt(-1, 1 << 16), "M_MMAP_THRESHOLD and M_TRIM_THRESHOLD"
    tiny = {"family": _SHAPES[case.shape]["family"], "layers": 2, "width": 32, "heads": 2}
    _train(tiny, Case(**{**asdict(case), "rows": 2, "tokens": 8}))
    gc.collect()
    before = _now(case.device)
    return _train(_SHAPES[case.shape], case) - before


def _train(sizes: dict[str, Any], case: Case) -> int:
    """Train three steps and return the most memory that was in use in the last one."""
    model, trained = build(sizes, case, case.device)
    ids = batch(model, case)
    config = lorank.TrainConfig(steps=3, learning_rate=1e-5)
    peak = 0
    for _ in lorank.train(trained, lambda given: loss(model, given), [ids], config):
        peak = _peak(case.device)
        _forget_peak(case.device)
    return peak


def _now(device: str) -> int:
    return _status("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()


def _peak(device: str) -> int:
    return _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def _forget_peak(device: str) -> None:
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def run(*several: Case) -> list[Found]:
    """Count and measure cases in one fresh process, one after the other."""
    words = [json.dumps(asdict(case)) for case in several]
    command = [sys.executable, "-m", "benchmarks.memory", "--case", *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    return [Found(**json.loads(line)) for line in done.stdout.splitlines()[-len(several) :]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", help="measure cases, given as JSON, in this process")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    if options.case:
        for given in options.case:
            case = Case(**json.loads(given))
            print(json.dumps(asdict(Found(counted(case), measured(case)))))
        return
    lines = ["| model | method | rows x tokens | | counted | measured | ratio |", "|---|---|---|---|---|---|---|"]
    ratios = []
    for case in cases(options.device):
        (found,) = run(case)
        ratios.append(found.ratio)
        others = [f"dropout {case.dropout}"] if case.dropout else []
        others += [case.dtype] if case.dtype != "float32" else []
        others += ["checkpointing"] if case.checkpointing else []
        lines.append(
            f"| {case.shape} | {case.method} | {case.rows} x {case.tokens} | {', '.join(others)} | "
            f"{found.counted / 1e6:,.1f} MB | {found.measured / 1e6:,.1f} MB | {found.ratio:.3f} |"
        )
        print(lines[-1], flush=True)
    lines.append(f"\n{len(ratios)} cases; counted / measured lies between {min(ratios):.3f} and {max(ratios):.3f}.")
    print(lines[-1])
    if options.write:
        text = options.write.read_text(encoding="utf-8").partition("<!-- table -->")[0]
        options.write.write_text(text + "<!-- table -->\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
