"""Options that several commands have, said once."""

from typing import Annotated

import typer

_FROM = "Base and adapters"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="the base: a hub id, a folder, or a GGUF file; default: the one that the adapter was trained on",
        show_default=False,
        rich_help_panel=_FROM,
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="folder of an adapter or of a run, PATH or NAME=PATH; may be given several times",
        show_default=False,
        rich_help_panel=_FROM,
    ),
]
WithBase = Annotated[
    bool, typer.Option("--base", help="the base without an adapter too, for comparison", rich_help_panel=_FROM)
]
OtherBase = Annotated[
    bool,
    typer.Option("--allow-other-base", help="use an adapter on another base than its own", rich_help_panel=_FROM),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str, typer.Option("--dtype", help="of the base: float32, bfloat16 or auto")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
