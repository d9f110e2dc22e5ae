"""The command line: one thin command per capability."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit("The command line needs typer and rich: `pip install peft-svf[cli]`.") from error

if TYPE_CHECKING:
    from .adaptation import MixtureResult

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


@app.command()
def search(
    model_name_or_path: Annotated[str, typer.Option("--model_name_or_path", help="The base model.")],
    expert: Annotated[list[str], typer.Option("--expert", metavar="NAME=PATH", help="An expert; at least one.")],
    examples: Annotated[str, typer.Option("--examples", help="A .jsonl, .json or .csv file, or a dataset of the Hub.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where to save the mixture.")],
    reward: Annotated[
        str,
        typer.Option(
            "--reward",
            help="exact, contains, number, choice, regex, math_verify, the dotted path of a function with TRL's "
            "signature, or loglik: the likelihood of the reference answers.",
        ),
    ] = "exact",
    tie_break: Annotated[
        float, typer.Option("--tie_break", help="Weight of the log-likelihood of the answers beside the reward.")
    ] = 0.0,
    prompt_column: Annotated[str, typer.Option("--prompt_column", help="Text or messages.")] = "prompt",
    answer_column: Annotated[
        Optional[str], typer.Option("--answer_column", help="Default: completion, answer or solution.")
    ] = None,
    system_prompt: Annotated[
        Optional[str], typer.Option("--system_prompt", help="Ask prompts as chat messages, after this one.")
    ] = None,
    dataset_config: Annotated[Optional[str], typer.Option("--dataset_config", help="Of a dataset.")] = None,
    dataset_split: Annotated[
        Optional[str], typer.Option("--dataset_split", help="Of a dataset. Default: train.")
    ] = None,
    limit: Annotated[Optional[int], typer.Option("--limit", help="Only the first so many examples.", min=1)] = None,
    validation: Annotated[
        str,
        typer.Option("--validation", help="auto, none, a share (0.3), a number of folds (3), or a file of examples."),
    ] = "auto",
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="cem, cem-paper, cma-es, sep-cma-es, random, or gradient (loglik).")
    ] = "cem",
    granularity: Annotated[
        str, typer.Option("--granularity", help="Weights per expert, or per expert and layer or module.")
    ] = "expert",
    bounds: Annotated[tuple[float, float], typer.Option("--bounds", help="Smallest and largest weight.")] = (0.0, 1.0),
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale weights down to a sum of 1.")] = False,
    l1: Annotated[float, typer.Option("--l1", help="Penalty on the sum of |weights|.")] = 0.0,
    l2: Annotated[float, typer.Option("--l2", help="Penalty on the sum of squared weights.")] = 0.0,
    num_generations: Annotated[int, typer.Option("--num_generations")] = 6,
    population_size: Annotated[int, typer.Option("--population_size")] = 32,
    racing: Annotated[bool, typer.Option("--racing/--no_racing", help="Drop bad candidates early.")] = True,
    patience: Annotated[Optional[int], typer.Option("--patience", help="Stop after so many without progress.")] = None,
    max_rows: Annotated[Optional[int], typer.Option("--max_rows", help="Pairs of a mixture and an example.")] = None,
    max_tokens: Annotated[Optional[int], typer.Option("--max_tokens")] = None,
    max_seconds: Annotated[Optional[float], typer.Option("--max_seconds")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", help="Of an answer.", min=1)] = 256,
    batch_size: Annotated[Optional[int], typer.Option("--batch_size", help="Rows per batch; found by itself.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the base model: auto, float32, bfloat16, ...")] = "auto",
    base_check: Annotated[
        str, typer.Option("--base_check", help="error, warn or ignore, if an expert is for another base model.")
    ] = "error",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a search that was stopped.")] = False,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Search the mixture of experts that suits a task, from a few examples of it.

    peft-svf search --model_name_or_path MODEL --expert math=experts/math --expert logic=experts/logic
    --examples shots.jsonl --reward number --max_new_tokens 64 --output_dir my-mixture
    """
    checkpoint = output_dir / "search-checkpoint.json"
    try:
        from .adaptation import AdaptiveMixture, LogLikelihoodObjective, RewardObjective, WeightedObjective
        from .adaptation.examples import FILES, load_examples
        from .scoring import find_reward

        if base_check not in ("error", "warn", "ignore"):
            raise ValueError(f"--base_check must be error, warn or ignore, got {base_check!r}.")
        columns: dict[str, Any] = {
            "prompt_column": prompt_column,
            "answer_column": answer_column,
            "system_prompt": system_prompt,
            "split": dataset_split,
            "config": dataset_config,
        }
        rows = load_examples(examples, **columns, limit=limit)
        held_out: Any = (
            load_examples(validation, **columns) if Path(validation).suffix in FILES else _number_or_word(validation)
        )
        function = None if reward == "loglik" else find_reward(reward)
        experts = _named(expert)
        mixture = AdaptiveMixture.from_pretrained(
            model_name_or_path,
            experts,
            base_check=base_check,  # type: ignore[arg-type]
            dtype=dtype,
        )
        objective: Any = (
            LogLikelihoodObjective(rows, mixture.tokenizer)
            if function is None
            else RewardObjective(
                rows, function, mixture.tokenizer, generation_kwargs={"max_new_tokens": max_new_tokens}
            )
        )
        if tie_break and function is not None:
            objective = WeightedObjective(
                [objective, LogLikelihoodObjective(rows, mixture.tokenizer)], [1.0, tie_break]
            )
        result = mixture.search(
            objective=objective,
            validation=held_out,
            granularity=granularity,  # type: ignore[arg-type]
            bounds=bounds,
            normalize=normalize,
            l1=l1,
            l2=l2,
            optimizer=optimizer,
            num_generations=num_generations,
            population_size=population_size,
            racing=racing,
            patience=patience,
            max_rows=max_rows,
            max_tokens=max_tokens,
            max_seconds=max_seconds,
            batch_size=batch_size,
            checkpoint=checkpoint,
            resume=resume,
            seed=seed,
        )
        mixture.save_pretrained(output_dir)
    except (ValueError, ImportError, OSError) as error:
        _fail(error)
    checkpoint.unlink(missing_ok=True)
    plotted = _plotted(result, output_dir / "search.png")
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    table = Table("", result.objective, "95 % interval", title=f"judged on: {result.judged_on}")
    for name, score in result.scores.items():
        low, high = result.intervals[name]
        table.add_row(name, f"{score:.3f}", f"{low:.3f} to {high:.3f}", style="bold" if name == result.choice else None)
    console = Console()
    console.print(table)
    console.print(str(result), highlight=False, markup=False)
    console.print(f"saved in {output_dir}" + (" with search.png" if plotted else ""), highlight=False, markup=False)


def _named(experts: list[str]) -> dict[str, str]:
    """Of `NAME=PATH`.

    Raises:
        ValueError: One is of another form, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for text in experts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--expert must be NAME=PATH, such as math=experts/math, got {text!r}.")
        if name in found:
            raise ValueError(f"--expert {name} is given twice, as {found[name]!r} and {path!r}.")
        found[name] = path
    return found


def _number_or_word(text: str) -> Any:
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _plotted(result: MixtureResult, path: Path) -> bool:
    """Draw it, if matplotlib is there."""
    try:
        result.plot(path)
    except ImportError:
        return False
    return True


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
