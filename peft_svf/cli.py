"""The command line: one thin command per capability."""

from __future__ import annotations

import sys
from typing import NoReturn

try:
    import typer
    from rich.console import Console
except ImportError as error:
    raise SystemExit("The command line needs typer and rich: `pip install peft-svf[cli]`.") from error

app = typer.Typer(
    name="peft-svf",
    help="Transformer² for PEFT: expert vectors, trained by reinforcement learning and mixed at inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def _commands() -> None:
    """Without this, a single command would be the whole program."""


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="[--config RECIPE.yaml] [--OPTION VALUE]...",
)
def train(context: typer.Context) -> None:
    """Train an expert: GRPO, RLOO or the paper's REINFORCE. `peft-svf train --help` lists all options (of TRL, too).

    For several processes: `accelerate launch -m peft_svf.training.run` with the same options.
    """
    try:
        from .training.run import prepare

        run = prepare(context.args)
    except (ValueError, ImportError, OSError) as error:
        _fail(error)
    run()


def _fail(error: Exception) -> NoReturn:
    """What a user did wrong, without the way it took through our code."""
    Console(stderr=True).print(f"[bold red]Error:[/] {type(error).__name__}: ", end="")
    Console(stderr=True, highlight=False, markup=False).print(str(error))
    sys.exit(1)


def main() -> None:
    """Entry point of the console script `peft-svf`."""
    app()


if __name__ == "__main__":
    main()
