"""How all commands speak: results to standard output, everything else to standard error, errors in one form."""

import io
import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import AdapterError, AdapterWarning

err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
out = Console(highlight=False, soft_wrap=True, markup=False)


class UsageError(AdapterError):
    """The command was called in a way that cannot be meant; it ends with exit code 2."""


def say(text: str, style: str = "") -> None:
    """Print a remark on standard error."""
    err.print(Text(text, style=style))


def result(data: Any, as_json: bool, show: Callable[[], object]) -> None:
    """Print a result on standard output: as JSON, or as people read it."""
    if as_json:
        sys.stdout.write(json.dumps(_finite(data), indent=2, ensure_ascii=False, default=str) + "\n")
    else:
        show()


def _finite(data: Any) -> Any:
    """Return data with null for NaN and infinities, which JSON has not."""
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def table(rows: Sequence[Mapping[str, Any]], title: str | None = None, numbers: Sequence[str] = ()) -> None:
    """Print rows with the same keys as a table; columns of `numbers` are set to the right."""
    if out.is_terminal:
        made = Table(title=title, title_justify="left", header_style="bold")
        for key in rows[0]:
            made.add_column(key, justify="right" if key in numbers else "left", overflow="fold")
        for row in rows:
            made.add_row(*(Text(str(value)) for value in row.values()))
        out.print(made)
        return
    if title:
        print(title)
    keys = list(rows[0])
    lines = [keys, *([str(row[key]) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    for line in lines:
        cells = [c.rjust(w) if k in numbers else c.ljust(w) for c, w, k in zip(line, widths, keys, strict=True)]
        print("  ".join(cells).rstrip())


def number(value: float) -> str:
    """Return a score as tables show it."""
    return f"{value:,.4g}" if abs(value) >= 1000 else f"{value:.4f}"


def run_app(app: Callable[[], None]) -> None:
    """Run the command line: exit 0 if all went well, 1 with a message for errors, 2 for wrong usage, 130 on Ctrl-C."""
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a sign shows its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()  # it meets Ctrl-C and broken pipes by itself
    except UsageError as error:
        _fail(str(error), code=2)
    except AdapterError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        _fail(
            f"out of memory: {str(error).splitlines()[0]}\nTry a smaller batch_size with accumulate, a smaller "
            "max_length, gradient_checkpointing=true or dtype=bfloat16; --dry-run estimates what a step takes"
        )


def _fail(message: str, code: int = 1) -> None:
    err.print(Text.assemble(("error: ", "bold red"), message))
    sys.exit(code)


_plain_warning = warnings.showwarning


def _show_warning(message: Any, category: type[Warning], *rest: Any, **options: Any) -> None:
    if issubclass(category, AdapterWarning):
        err.print(Text.assemble(("warning: ", "bold yellow"), str(message)))
    else:
        _plain_warning(message, category, *rest, **options)
