"""lorank merge: an ordinary checkpoint with the adapter folded in."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import AdapterError, dtype_name
from .console import UsageError, err, out, result, say
from .options import Json, OtherBase


def merge(
    adapter: Annotated[str, typer.Option("--adapter", help="folder of an adapter or of a run")],
    target: Annotated[str, typer.Option("--out", help="folder of the merged checkpoint; it must not be there yet")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="the base: a hub id or a folder; default: the one that the adapter was trained on",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: each tensor's own", show_default=False)
    ] = None,
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="load the whole model: for bases that are not safetensors (GGUF, .bin)")
    ] = False,
    allow_other_base: OtherBase = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="open an adapter_model.bin")] = False,
    as_json: Json = False,
) -> None:
    """Write an ordinary Hugging Face checkpoint with the adapter folded in, and say what rounding cost.

    The base is read and written one tensor at a time: memory does not grow with the model. W + ΔW is computed in
    float32 and rounded once. The folder appears when it is whole; killed anywhere, nothing half-written is left in
    its place.

    \b
    Examples:
      lorank merge --adapter runs/e2e --out merged
      lorank merge --adapter adapters/sst2 --model roberta-base --out merged --dtype bfloat16
    """
    import torch

    from ..formats import read
    from ..models import checkpoint_folder, computing
    from ..runs.loading import base_of, folder_of, labels_of

    place = folder_of(adapter)
    content = read(place, allow_pickle=allow_pickle)
    task = content.task or "causal-lm"
    name = model or base_of(place, content)
    if name is None:
        raise AdapterError(f"which base? {adapter} does not say; give --model")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UsageError(f"dtype is {dtype!r}; it must be float32, bfloat16 or float16")
    kind = getattr(torch, dtype) if dtype else None
    labels = labels_of(content, name)
    changed = computing(content.about.get("model_options"))
    options: dict[str, Any] = {"allow_other_base": allow_other_base, "allow_pickle": allow_pickle}
    if in_memory:
        report = _in_memory(name, place, Path(target), task, labels, kind, options | {"changed": changed})
    else:
        if changed:
            raise AdapterError(
                f"the adapter was trained on a base with {changed} in its configuration; --in-memory merges it, and "
                "writes the configuration with them"
            )
        report = _streamed(checkpoint_folder(name), place, Path(target), task, labels, kind, options)
    rows = [
        {**dataclasses.asdict(row), "dtype": dtype_name(row.dtype)}
        for row in sorted(report.rows, key=lambda row: -row.relative_error)
    ]
    facts = {"out": target, "base": name, "adapter": str(place), "copies": list(report.copies), "layers": rows}

    def show() -> None:
        out.print(str(report))
        out.print(f"written to {target}")

    result(facts, as_json, show)


def _streamed(base: Path, place: Path, target: Path, task: str, labels: Any, dtype: Any, options: dict) -> Any:
    from ..checkpoints import Checkpoint
    from ..formats import read
    from ..models import empty_base, load_tokenizer, padding_of_classifier
    from ..streaming import merge_checkpoint

    known = Checkpoint.of(base).config.get("id2label") or range(2)
    model = empty_base(str(base), task, labels=len(labels or known))
    content = read(place, model, allow_pickle=options["allow_pickle"])
    config: dict[str, Any] = {}
    if task != "causal-lm":
        config = {"architectures": [type(model).__name__]}
        padding = padding_of_classifier(model.config, load_tokenizer(str(base)))
        config |= {"pad_token_id": padding} if padding is not None else {}
    if task != "causal-lm" and labels:
        config |= {
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "regression" if task == "regression" else "single_label_classification",
        }
    with err.status("merging ...") as status:
        return merge_checkpoint(
            base,
            content,
            model,
            target,
            dtype=dtype,
            allow_other_base=options["allow_other_base"],
            config=config,
            progress=lambda file: status.update(f"merging {file} ..."),
        )


def _in_memory(name: str, place: Path, target: Path, task: str, labels: Any, dtype: Any, options: dict) -> Any:
    import torch

    from ..checkpoints import appearing_whole
    from ..formats import load
    from ..merging import merge as merge_model
    from ..models import load_base, quiet
    from ..runs.loading import require_trained_head

    say("loading the whole model", "dim")
    # In float32 first: the base rounded to the dtype before the update is added would be rounded twice.
    changed = options.pop("changed")
    base = load_base(name, task, dtype=torch.float32 if dtype else None, labels=labels, changed=changed)
    require_trained_head(base, load(base.model, place, **options).copies, "the adapter")
    report = merge_model(base.model)
    if dtype:
        base.model.to(dtype)
    with appearing_whole(target) as folder, quiet():
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    return report
