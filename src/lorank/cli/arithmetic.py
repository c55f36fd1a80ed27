"""What the commands of adapter arithmetic have in common: reading adapters, and writing one where none is yet."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import AdapterError
from .console import UsageError, out

Output = Annotated[str, typer.Option("--output", "--out", help="folder of the new adapter")]
Force = Annotated[bool, typer.Option("--force", help="replace an adapter that is in the folder already")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="open an adapter_model.bin")]
Rank = Annotated[int | None, typer.Option("--rank", help="of every layer", show_default=False)]
Energy = Annotated[
    float | None,
    typer.Option("--energy", help="instead: the share of the squared singular values to keep", show_default=False),
]


@contextmanager
def wrong_usage() -> Iterator[None]:
    """Turn what is wrong with a command's options into wrong usage, which ends with exit code 2."""
    try:
        yield
    except AdapterError as error:
        raise UsageError(str(error)) from None


def free(target: str, force: bool) -> Path:
    """Return the folder to write to; raises AdapterError when something is in it, unless that may be replaced."""
    path = Path(target).expanduser()
    if path.is_file():
        raise AdapterError(f"{target} is a file; an adapter is a folder")
    if not force and path.is_dir() and any(path.iterdir()):
        raise AdapterError(f"{target} exists and is not empty; choose another folder, or --force")
    return path


def content_of(adapter: str | Path, allow_pickle: bool) -> Any:
    """Return what an adapter file, or that of a run, says."""
    from ..formats import read
    from ..runs.loading import folder_of

    return read(folder_of(str(adapter)), allow_pickle=allow_pickle)


def show_written(report: Any, target: Path) -> None:
    """Print what was done, and where the result is."""
    out.print(str(report))
    out.print(f"written to {target}")
