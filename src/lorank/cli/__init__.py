"""The command line: one file a command. Nothing heavy is imported before a command needs it."""

import typer

from ..version import __version__
from .combine import combine
from .compare import compare
from .console import run_app
from .convert import convert
from .demo import demo
from .diff import diff
from .eval import evaluate
from .extract import extract
from .generate import generate
from .inspect import inspect
from .merge import merge
from .plan import plan
from .pull import pull
from .push import push
from .reproduce import reproduce
from .resize import resize
from .scale import scale
from .score import score
from .train import train

app = typer.Typer(
    name="lorank",
    help="Low-rank adaptation of language models and classifiers: train, evaluate, generate, merge, inspect, plan.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    epilog="lorank COMMAND --help shows examples.",
)
app.command("demo")(demo)
app.command("train")(train)
app.command("compare")(compare)
app.command("reproduce")(reproduce)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("score")(score)
app.command("merge")(merge)
app.command("inspect")(inspect)
app.command("plan")(plan)
app.command("convert")(convert)
app.command("combine")(combine)
app.command("resize")(resize)
# -1 is a number, and no option
app.command("scale", context_settings={"ignore_unknown_options": True})(scale)
app.command("extract")(extract)
app.command("diff")(diff)
app.command("push")(push)
app.command("pull")(pull)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lorank {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="print the version"),
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    run_app(app)
