"""lorank generate: let a base and its adapters answer; a classifier names its label."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import AdapterError
from .console import UsageError, err, out, say
from .options import (
    Adapters,
    Beams,
    Device,
    Dtype,
    Json,
    LengthPenalty,
    MaxNewTokens,
    MinNewTokens,
    Model,
    NoRepeat,
    OtherBase,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopP,
    WithBase,
)


def generate(
    adapter: Adapters = None,
    model: Model = None,
    base: WithBase = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="a prompt; may be given several times", show_default=False),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", help="prompts: a line each of a .txt file, or the records of a data file", show_default=False
        ),
    ] = None,
    save: Annotated[str | None, typer.Option("--out", help="write JSON lines here", show_default=False)] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="only the first so many records of the file", show_default=False)
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="take prompts as they are, without the template of the training")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="put prompts into the chat template")] = False,
    system: Annotated[str | None, typer.Option(help="system message for --chat", show_default=False)] = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: MinNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    beams: Beams = None,
    length_penalty: LengthPenalty = None,
    no_repeat_ngram: NoRepeat = None,
    repetition_penalty: RepetitionPenalty = None,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts of a file at once")] = 8,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    allow_other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Generate text with adapters side by side, for prompts, a file of them, or interactively.

    Without --prompt and --file it asks for prompts, and streams the answers. Prompts are put into the template that
    the adapter was trained with. With an adapter for classification or regression it predicts instead.

    \b
    Examples:
      lorank generate --adapter runs/e2e --prompt 'name[The Eagle], food[French]'
      lorank generate --adapter runs/one --adapter runs/two --base -p 'Tell me a joke.'
      lorank generate --adapter runs/sst2 --file reviews.jsonl --out labels.jsonl
      lorank generate --adapter runs/e2e --file test.csv --out e2e.jsonl --beams 10 --length-penalty 0.9
      lorank generate --model HuggingFaceTB/SmolLM2-135M-Instruct --chat
    """
    import torch

    from ..runs.loading import load_adapted
    from .answering import Answering, decoding_of

    if prompt and file:
        raise UsageError("give --prompt or --file, not both")
    if save and not file:
        raise UsageError("--out goes with --file")
    if save and Path(save).exists():
        raise AdapterError(f"{save} exists; choose another --out, or remove it first")
    if not adapter and model is None:
        raise UsageError("which model? Give an --adapter, or a --model")
    if file and not Path(file).is_file() and Path(file).suffix == ".txt":
        raise AdapterError(f"there is no file {file}")
    chosen = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "temperature": temperature}
    chosen |= {"top_p": top_p, "beams": beams, "length_penalty": length_penalty}
    chosen |= {"no_repeat_ngram_size": no_repeat_ngram, "repetition_penalty": repetition_penalty}
    decoding = decoding_of(chosen)
    with err.status("loading the model ..."):
        loaded = load_adapted(model, adapter or [], dtype=dtype, device=device, allow_other_base=allow_other_base)
    torch.manual_seed(seed or 0)
    answering = Answering(loaded, with_base=base, raw=raw, chat=chat, system=system, decoding=decoding)
    if file:
        _from_file(answering, file, save, limit, batch_size)
        return
    for text in prompt or _asked():
        try:
            if as_json:
                answers = answering.all_at_once([text], 1)[0]
                sys.stdout.write(json.dumps({"prompt": text, "outputs": answers}, ensure_ascii=False) + "\n")
            else:
                _side_by_side(answering, text)
        except AdapterError as error:
            if prompt:
                raise
            say(f"error: {error}", "red")  # and ask for the next one


def _side_by_side(answering: Any, text: str) -> None:
    """Stream the answer of each adapter, under its name when there are several."""
    for name in answering.names:
        if len(answering.names) > 1:
            out.print(name or "(base)", style="bold", end="\n" if out.is_terminal else ":\n")
        answering.one(name, text, lambda piece: (sys.stdout.write(piece), sys.stdout.flush()))
        sys.stdout.write("\n")


def _asked() -> Iterator[str]:
    """Yield prompts that are typed, or come line by line from a pipe, until there are no more."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() a history and editing
    say("A prompt a line; an empty line or Ctrl-D ends.", "dim")
    while True:
        try:
            if not sys.stdout.isatty():  # the answers go to a file, and the sign is no part of them
                err.print("> ", end="")
            text = input("> " if sys.stdout.isatty() else "")
        except EOFError:
            return
        if not text.strip():
            return
        yield text


def _from_file(answering: Any, file: str, save: str | None, limit: int | None, batch_size: int) -> None:
    """Answer every record of a file; the results keep the order of the file."""
    from rich.progress import track

    records = answering.records(file, limit)
    pieces = [records[i : i + 8 * batch_size] for i in range(0, len(records), 8 * batch_size)]
    partial = Path(f"{save}.partial") if save else None
    try:
        with partial.open("w", encoding="utf-8") if partial else contextlib.nullcontext(sys.stdout) as target:
            for chunk in track(pieces, "generating", console=err, transient=True, disable=not err.is_terminal):
                for record, answers in zip(chunk, answering.all_at_once(chunk, batch_size), strict=True):
                    line: dict[str, Any] = {**_plain(record), "outputs": answers}
                    target.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
                target.flush()
    except BaseException:
        if partial and partial.exists():
            say(f"what was answered so far is in {partial}", "yellow")
        raise
    if partial and save:
        partial.replace(save)
        say(f"{len(records):,} records written to {save}")


def _plain(record: Mapping[str, Any] | str) -> dict[str, Any]:
    if isinstance(record, str):
        return {"prompt": record}
    return {key: value for key, value in record.items() if key != "outputs"}
