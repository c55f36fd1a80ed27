"""Table 1 of the paper on this machine: the time of a forward pass of GPT-2 medium's shape, with and without adapters.

    python -m benchmarks.latency --dtype bfloat16 --write docs/results/paper/latency.md

The base, LoRA merged and unmerged, and adapters of Houlsby and Lin of about the same size, all with random weights:
what is timed does not depend on them. The five models take turns, in an order that moves on by one every round, and
what is reported is the median of the ratios to the base of the same round, with a 95 % interval of that median by
bootstrap. Batches and lengths are those of the paper.
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2Model

import lorank

_RANK = 4  # of LoRA on Wq and Wv: what the paper trains GPT-2 with
# (batch, length, parameters in adapters, bottleneck of Houlsby's, bottleneck of Lin's, rounds)
_SETTINGS = (
    (32, 512, "0.5M", 5, 10, 4),
    (16, 256, "11M", 112, 224, 10),
    (1, 128, "11M", 112, 224, 100),
)
_PAPER = {  # in ms, on a Quadro RTX8000
    (32, 512): {"base": 1449.4, "adapter-l": 1482.0, "adapter-h": 1492.2},
    (16, 256): {"base": 338.0, "adapter-l": 354.8, "adapter-h": 366.3},
    (1, 128): {"base": 19.8, "adapter-l": 23.9, "adapter-h": 25.8},
}


def variants(houlsby: int, lin: int, device: str, dtype: torch.dtype, sizes: dict[str, int]) -> dict[str, Any]:
    """Return the models by name, the base first."""
    torch.manual_seed(0)
    base: Any = GPT2Model(GPT2Config(**sizes)).to(device, dtype).eval().requires_grad_(False)  # type: ignore[arg-type]
    found: dict[str, Any] = {"base": base}
    for name, spec in (
        ("lora, merged", lorank.LoRA(rank=_RANK)),
        ("lora, unmerged", lorank.LoRA(rank=_RANK)),
        ("adapter-l", lorank.AdapterL(size=lin)),
        ("adapter-h", lorank.AdapterH(size=houlsby)),
    ):
        model = copy.deepcopy(base)
        lorank.adapt(model, spec, ["c_attn[q,v]"] if "lora" in name else None)
        with torch.no_grad():
            for parameter in lorank.adapter_parameters(model).values():
                parameter.add_(0.01 * torch.randn_like(parameter))
        if name.endswith(", merged"):
            lorank.merge(model)
        found[name] = model.requires_grad_(False)
    return found


@torch.no_grad()
def time_of(model: Any, ids: torch.Tensor) -> float:
    """Return the seconds of one forward pass."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    model(ids, use_cache=False)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rounds_of(models: dict[str, Any], ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each model by round."""
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        time_of(models[name], ids[:1])  # kernels are chosen
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(time_of(models[name], ids))
    return times


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median, by 2,000 resamples."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(values), (2000, len(values)), generator=generator)
    medians = torch.tensor(values)[drawn].median(dim=1).values
    low, high = medians.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def table(batch: int, length: int, size: str, times: dict[str, list[float]], models: dict[str, Any]) -> list[str]:
    """Return the lines of a setting's table."""
    paper = _PAPER.get((batch, length), {})
    lines = [
        f"### Batch {batch}, length {length}, adapters of about {size} parameters, {len(times['base'])} rounds",
        "",
        "| model | added parameters | ms, median | of the base, median of ratios | 95 % interval | the paper's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    own = sum(parameter.numel() for parameter in models["base"].parameters())
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["base"], strict=True)]
        low, high = interval(ratios)
        added = sum(parameter.numel() for parameter in models[name].parameters()) - own
        printed = f"{100 * (paper[name] / paper['base'] - 1):+.1f} %" if name in paper and name != "base" else ""
        printed = "+0 % (one row with the base)" if name == "lora, merged" and paper else printed
        cells = [name, f"{added:,}", f"{1000 * statistics.median(values):,.1f}"]
        middle, low, high = (100 * (ratio - 1) for ratio in (statistics.median(ratios), low, high))
        cells += [f"{middle:+.1f} %", f"{low:+.1f} to {high:+.1f} %", printed]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="put the tables into this page, behind its line '<!-- DTYPE -->'")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    parser.add_argument("--largest", type=int, default=2**20, help="leave out batches of more tokens than this")
    parser.add_argument("--rounds", type=float, default=1.0, help="times the usual number of rounds")
    parser.add_argument("--layers", type=int, default=24, help="fewer for a trial")
    chosen = parser.parse_args()
    sizes = {"n_embd": 1024, "n_head": 16, "n_layer": chosen.layers}
    lines = [
        f"## {chosen.dtype}",
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, "
        f"{chosen.device}, {chosen.dtype}",
        "",
    ]
    for batch, length, size, houlsby, lin, rounds in reversed(_SETTINGS):
        if batch * length > chosen.largest:
            continue
        models = variants(houlsby, lin, chosen.device, getattr(torch, chosen.dtype), sizes)
        ids = torch.randint(0, 50257, (batch, length), generator=torch.Generator().manual_seed(1)).to(chosen.device)
        times = rounds_of(models, ids, max(2, round(rounds * chosen.rounds)))
        lines += table(batch, length, size, times, models)
        print("\n".join(lines), flush=True)
        if chosen.write:
            mark = f"<!-- {chosen.dtype} -->"
            before, _, rest = chosen.write.read_text().partition(mark)
            after = rest[rest.index("<!--") :] if "<!--" in rest else ""
            chosen.write.write_text(before + mark + "\n" + "\n".join(lines) + "\n" + after)


if __name__ == "__main__":
    main()
