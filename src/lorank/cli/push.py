"""lorank push: an adapter to the Hugging Face hub, with a model card."""

import sys
from typing import Annotated, Any

import typer

from .console import UsageError, err, out, result, say
from .options import Json


def push(
    adapter: Annotated[str, typer.Argument(help="folder of an adapter or of a run")],
    repo: Annotated[str, typer.Argument(help="where to: user/name on the hub; it is made if it is not there yet")],
    private: Annotated[bool, typer.Option("--private", help="only you see it")] = False,
    revision: Annotated[
        str | None, typer.Option(help="a branch, made if it is not there yet; default: main", show_default=False)
    ] = None,
    message: Annotated[str | None, typer.Option(help="of the commit", show_default=False)] = None,
    license: Annotated[
        str | None, typer.Option(help="for the card, as the hub names it: apache-2.0", show_default=False)
    ] = None,
    card: Annotated[str, typer.Option(help="keep a README.md that somebody wrote, or write a new one")] = "keep",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the card and the files, and send nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask before the upload")] = False,
    as_json: Json = False,
) -> None:
    """Upload an adapter to the Hugging Face hub, with a model card made of what its files say.

    Uploaded are, as one commit, the adapter's own files, README.md, and of a run the plot of its loss; never a pickle.
    An adapter with NaN or Inf, or that cannot be read, is refused. Log in first: hf auth login, or HF_TOKEN.

    \b
    Examples:
      lorank push runs/e2e my-name/e2e-lora --license apache-2.0
      lorank push runs/e2e my-name/e2e-lora --dry-run
      lorank push adapters/sst2 my-name/sst2 --private --yes
    """
    if card not in ("keep", "new"):
        raise UsageError(f"card is {card!r}; it must be keep or new")
    from ..accounting import readable
    from ..hub import pack, upload

    choice: Any = card
    package = pack(adapter, repo, license=license, card=choice)
    sizes = package.sizes()
    listed = [f"{name}  {readable(size)}" for name, size in sizes.items()]
    for note in package.notes:
        say(f"note: {note}", "dim")
    facts = {"repo": repo, "files": sizes, "private": private, "revision": revision, "notes": package.notes}
    if dry_run:

        def show() -> None:
            out.print("\n".join([*listed, "", package.card]))
            out.print("dry run: nothing was uploaded")

        result(facts | {"url": None, "card": package.card}, as_json, show)
        return
    if not yes:
        say("\n".join(listed))
        _confirm(f"upload these to {repo}{', private' if private else ''}?")
    url = upload(package, private=private, revision=revision, message=message, card=choice)
    result(facts | {"url": url}, as_json, lambda: out.print(url))


def _confirm(question: str) -> None:
    """Ask on standard error; raises UsageError for anything but yes, and where nobody answers."""
    err.print(f"{question} [y/N] ", end="")
    answer = sys.stdin.readline()
    if not answer:
        raise UsageError("nothing was uploaded: nobody said yes; --yes does not ask")
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was uploaded")
