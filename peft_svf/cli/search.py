"""`peft-svf search`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from .errors import fail
from .options import drawn, named_experts


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
        str, typer.Option("--optimizer", help="cem, cem-paper, cma-es, sep-cma-es, random, or gradient.")
    ] = "cem",
    granularity: Annotated[
        str, typer.Option("--granularity", help="Weights per expert, or per expert and layer or module.")
    ] = "expert",
    bounds: Annotated[tuple[float, float], typer.Option("--bounds", help="Smallest and largest weight.")] = (0.0, 1.0),
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale weights down to a sum of 1.")] = False,
    l1: Annotated[float, typer.Option("--l1", help="Penalty on the sum of |weights|.")] = 0.0,
    l2: Annotated[float, typer.Option("--l2", help="Penalty on the sum of squared weights.")] = 0.0,
    num_generations: Annotated[
        Optional[int], typer.Option("--num_generations", help="At most. Default: 6, or 12 steps of the gradient.")
    ] = None,
    population_size: Annotated[int, typer.Option("--population_size")] = 32,
    racing: Annotated[bool, typer.Option("--racing/--no_racing", help="Drop bad candidates early.")] = True,
    one_standard_error: Annotated[
        bool,
        typer.Option(
            "--one_standard_error/--best_score", help="Keep a simple choice unless another is better beyond the noise."
        ),
    ] = True,
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

    For several processes: `accelerate launch -m peft_svf search` with the same options.
    """
    checkpoint = output_dir / "search-checkpoint.json"
    try:
        from ..mixture.mixture import AdaptiveMixture
        from ..scoring.datasets import FILES, load_examples
        from ..scoring.objectives import LogLikelihoodObjective, RewardObjective, WeightedObjective
        from ..scoring.rewards import find_reward
        from ..utils.processes import by_main_process, leave, processes

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
        if tie_break and function is not None and optimizer == "gradient":
            raise ValueError("--tie_break has no --optimizer gradient, which has hardly any ties to break; drop one.")
        experts = named_experts(expert)
        for name, path in experts.items():
            if output_dir.resolve() == Path(path).resolve():
                raise ValueError(f"--output_dir {output_dir} is the folder of expert {name!r}; take another one.")
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
            one_standard_error=one_standard_error,
            patience=patience,
            max_rows=max_rows,
            max_tokens=max_tokens,
            max_seconds=max_seconds,
            batch_size=batch_size,
            checkpoint=checkpoint,
            resume=resume,
            seed=seed,
        )
        by_main_process(lambda: mixture.save_pretrained(output_dir))
        leave()
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    if not processes().is_main_process:
        return
    if result.stopped == "interrupted":
        print(f"Interrupted; `--resume` goes on from {checkpoint}.", file=sys.stderr)
    else:
        checkpoint.unlink(missing_ok=True)
    plotted = drawn(result, output_dir / "search.png")
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


def _number_or_word(text: str) -> Any:
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
