"""The command line `peft-svf`: one thin command per capability, one file per group of commands."""

from __future__ import annotations

from typing import Annotated

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:
    from ..utils.extras import needs

    raise SystemExit(str(needs("cli", "The command line", "typer and rich"))) from error

from ..utils.version import __version__
from .adapt import chat, evaluate, generate
from .errors import quiet_third_parties, show_tracebacks
from .files import files
from .library import library
from .playground import playground
from .search import search
from .serve import serve
from .train import train
from .training_options import TrainCommand

app = typer.Typer(
    name="peft-svf",
    help="Transformer² for PEFT: expert vectors, trained by reinforcement learning and mixed at inference.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,  # its tables wrap every option to a word a line on a narrow terminal
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"peft-svf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    show_tracebacks(debug)


# The options of `train` are TRL's, so its own parser reads them.
app.command(
    cls=TrainCommand,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[--config RECIPE.yaml] [--OPTION VALUE]...",
)(train)
for command in (search, generate, chat, evaluate, playground, serve):
    app.command()(command)
app.add_typer(library, name="library")
app.add_typer(files)


def main() -> None:
    """Entry point of the console script `peft-svf`."""
    quiet_third_parties()
    app()
