"""lorank pull: an adapter from the Hugging Face hub."""

from typing import Annotated

import typer

from .console import out, result, say
from .options import Json


def pull(
    repo: Annotated[str, typer.Argument(help="user/name on the hub")],
    revision: Annotated[
        str | None, typer.Option(help="a branch, a tag or a commit; default: main", show_default=False)
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "--out", help="folder for it; default: the repository's name", show_default=False),
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(help="a folder or file of the repository, when the adapter is not at its top", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an adapter that is in the folder already")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="take an adapter_model.bin where there is nothing else")
    ] = False,
    as_json: Json = False,
) -> None:
    """Download an adapter from the Hugging Face hub, and nothing else of its repository, into a folder.

    Files are kept in the cache of the hub's library (HF_HOME), and are taken from there with HF_HUB_OFFLINE=1. The exit
    code is 1 when something is wrong with the adapter, as with lorank inspect.

    \b
    Examples:
      lorank pull my-name/e2e-lora
      lorank pull my-name/e2e-lora --revision v2 --output adapters/e2e
      lorank pull my-name/many --path checkpoint-500
    """
    from ..accounting import readable
    from ..hub import fetch

    pulled = fetch(repo, output, revision=revision, path=path, force=force, allow_pickle=allow_pickle)
    found = pulled.examination
    folder = pulled.path.parent if pulled.path.is_file() else pulled.path
    size = sum((folder / name).stat().st_size for name in pulled.files if name != "README.md")
    facts = {
        "repo": repo,
        "commit": pulled.commit,
        "output": str(pulled.path),
        "files": pulled.files,
        "base_model": found.base_model,
        "parameters": found.parameters,
        "layers": len(found.layers),
        "methods": sorted({layer.method for layer in found.layers}),
        "problems": found.problems,
        "remarks": found.remarks,
    }

    def show() -> None:
        what = ", ".join(facts["methods"]) or "no layers"
        base = f", base {found.base_model}" if found.base_model else ""
        out.print(
            f"{pulled.path}: {what}, {found.parameters:,} parameters in {len(found.layers)} layers, "
            f"{readable(size)}{base}"
        )
        for problem in found.problems:
            out.print(f"PROBLEM: {problem}", style="bold red")

    for remark in found.remarks:
        say(f"remark: {remark}", "dim")
    result(facts, as_json, show)
    if found.problems:
        raise typer.Exit(1)
