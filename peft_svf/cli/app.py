"""The command line `peft-svf`: one thin command per capability, one file per group of commands."""

from __future__ import annotations

from typing import Annotated

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:
    raise SystemExit("The command line needs typer and rich: `pip install peft-svf[cli]`.") from error

from .adapt import chat, evaluate, generate
from .errors import quiet_third_parties, show_tracebacks
from .files import files
from .search import search
from .train import train

app = typer.Typer(
    name="peft-svf",
    help="Transformer² for PEFT: expert vectors, trained by reinforcement learning and mixed at inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,  # its tables wrap every option to a word a line on a narrow terminal
)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    show_tracebacks(debug)


# The options of `train` are TRL's, so its own parser reads them.
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[--config RECIPE.yaml] [--OPTION VALUE]...",
)(train)
for command in (search, generate, chat, evaluate):
    app.command()(command)
app.add_typer(files)


def main() -> None:
    """Entry point of the console script `peft-svf`."""
    quiet_third_parties()
    app()
