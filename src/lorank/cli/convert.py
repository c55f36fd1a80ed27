"""lorank convert: an adapter in another format."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import AdapterError
from .console import err, out, result, say
from .options import Json


def convert(
    adapter: Annotated[str, typer.Argument(help="folder of an adapter or of a run, or a file; told by what it holds")],
    target: Annotated[str, typer.Option("--output", "-o", help="file or folder of the result")],
    to: Annotated[str, typer.Option("--to", help="peft, vllm, loralib, gguf, mlx or kohya")] = "peft",
    model: Annotated[
        str | None,
        typer.Option("--model", help="the base, of which the configuration alone is read", show_default=False),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option("--verify", help="load this base, and compare its outputs with both", show_default=False),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="of a file that does not store it (loralib)", show_default=False)
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(help="of a fused projection that a loralib file adapts: q,v", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an adapter that is there")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="open a pickle, if you trust its origin")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter in another tool's format, and say what was kept, folded, or cannot be done.

    The source is recognised by its content. Formats whose names or rows depend on the base (GGUF, kohya, torchtune)
    need --model. Where the new format has one rank or scale for all layers, the others are folded into B, which
    changes nothing in the outputs. What it cannot hold is an error, and nothing is written.

    \b
    Examples:
      lorank convert runs/e2e --to vllm --output served
      lorank convert adapters/sst2 --to gguf --model HuggingFaceTB/SmolLM2-135M -o sst2.gguf
      lorank convert mnli.bin --alpha 16 --allow-pickle --model roberta-base -o mnli --verify roberta-base
    """
    from ..runs.loading import folder_of

    place = folder_of(adapter)
    path = Path(target).expanduser()
    _require_free(path, force)
    given: dict[str, Any] = {"allow_pickle": allow_pickle, "alpha": alpha}
    given["parts"] = tuple(part.strip() for part in parts.split(",")) if parts else ()
    done = _converted(place, path, to, model or verify, given)
    if verify is not None:
        done.verified = _verified(verify, done, given)
    result(done.to_json(), as_json, lambda: out.print(str(done)))
    if done.verified is not None and not done.verified.equal:
        raise typer.Exit(1)


def _require_free(path: Path, force: bool) -> None:
    """Raise AdapterError for a target that is there, unless it is an adapter that is to be replaced."""
    from ..formats import detect

    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if detect(path) is None:
        raise AdapterError(f"{path} is there already, and is no adapter; choose another name")
    if not force:
        raise AdapterError(f"{path} is an adapter already; --force replaces it")


def _converted(place: Path, path: Path, to: str, model: str | None, given: dict[str, Any]) -> Any:
    """Convert without a model where that can be done, unless one is named."""
    from ..converting import convert as convert_file
    from ..formats import read, writable
    from ..models import empty_base, known_labels
    from ..runs.loading import base_of

    def of(name: str, content: Any) -> Any:
        task, labels = _purpose(content, name)
        return empty_base(name, task, labels=len(labels or known_labels(name)))

    if model is not None:
        return convert_file(place, path, to, of(model, read(place, **given)), **given)
    try:
        return convert_file(place, path, to, None, **given)
    except AdapterError as error:
        content = read(place, **given) if _says_base(place) and to in writable() else None
        base = None if content is None else base_of(place, content)
        if base is None:
            raise
        say(f"reading the configuration of {base}", "dim")
        try:
            empty = of(base, content)
        except AdapterError:
            raise error from None
        return convert_file(place, path, to, empty, **given)


def _verified(name: str, done: Any, given: dict[str, Any]) -> Any:
    """Compare the outputs of a base with both files, on random tokens."""
    import torch

    from ..converting import verify as compare
    from ..formats import Given
    from ..models import computing, load_base

    task, labels = _purpose(done.content, name)
    with err.status(f"loading {name} to compare ..."):
        base = load_base(name, task, labels=labels, changed=computing(done.content.about.get("model_options")))
        tokens = base.model.get_input_embeddings().num_embeddings
        ids = torch.randint(tokens, (2, 16), generator=torch.Generator().manual_seed(0))
        return compare(base.model, done.source, done.target, {"input_ids": ids}, Given(**given), done.told)


def _purpose(content: Any, name: str) -> tuple[str, Any]:
    """Return what a model has to be for an adapter, and the names of its labels, None to leave them as they are."""
    from ..formats.content import outputs_of_head
    from ..models import task_of
    from ..runs.loading import labels_of

    if content.task is not None:
        return content.task, labels_of(content, name)
    count = outputs_of_head(content)
    if not count:
        return task_of(name) or "causal-lm", None
    return ("regression" if count == 1 else "classification"), [f"LABEL_{i}" for i in range(count)]


def _says_base(place: Path) -> bool:
    """Tell whether an adapter is in PEFT's layout, which says what its base is."""
    return (place / "adapter_config.json").is_file()
