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

_HOW = "How to generate"

MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="longest answer", show_default="128", rich_help_panel=_HOW),
]
MinNewTokens = Annotated[
    int | None, typer.Option("--min-new-tokens", min=0, help="shortest answer", show_default="0", rich_help_panel=_HOW)
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0.0,
        help="0 takes the likeliest token; above, tokens are drawn",
        show_default="0",
        rich_help_panel=_HOW,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        help="draw from the likeliest tokens of this probability",
        show_default="1",
        rich_help_panel=_HOW,
    ),
]
Beams = Annotated[
    int | None, typer.Option("--beams", min=1, help="width of a beam search", show_default="1", rich_help_panel=_HOW)
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(
        "--length-penalty",
        help="of a beam search: log-probabilities are divided by the length to this power",
        show_default="1",
        rich_help_panel=_HOW,
    ),
]
NoRepeat = Annotated[
    int | None,
    typer.Option(
        "--no-repeat-ngram",
        min=0,
        help="no sequence of so many tokens twice; 0 lets it",
        show_default="0",
        rich_help_panel=_HOW,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        help="above 1, tokens that were there before are less likely",
        show_default="1",
        rich_help_panel=_HOW,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, max=2**32 - 1, help="for drawing tokens", show_default="0", rich_help_panel=_HOW),
]
