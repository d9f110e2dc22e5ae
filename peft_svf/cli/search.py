"""`peft-svf search`: the options are the fields of `SearchConfig`."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from ..search.config import METHODS, SearchConfig
from .choices import check_reward, one_of
from .errors import EXPECTED, fail, prints_to_stderr
from .options import (
    DATA,
    AnswerColumnOption,
    ChatOption,
    CheckOption,
    CompletionColumnOption,
    DtypeOption,
    ExpertOption,
    JsonOption,
    LibraryOption,
    MessagesColumnOption,
    ModelOption,
    PromptColumnOption,
    check_dtype,
    chosen_experts,
    drawn,
    tell_dtype,
)
from .output import ADAPTER, OverwriteOption, check_output

# Set by other options, or for several reward functions.
_LEFT_OUT = ("checkpoint", "reward_weights")
# What the command line takes in addition to the values of the field.
_MORE = {"validation": "Or a file of held-out examples."}


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        print(context.get_help())
        raise typer.Exit


def _with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in the place of its `**settings`, an option for each field of [`SearchConfig`]."""
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    types = get_type_hints(SearchConfig)
    made = []
    for each in fields(SearchConfig):
        if each.name in _LEFT_OUT:
            continue
        kind, default = types[each.name], each.default
        if kind not in (bool, int, float, str, tuple[float, float], Optional[int], Optional[float], Optional[bool]):
            kind, default = Optional[str], None if default in (None, inspect.Parameter.empty) else str(default)
        if each.default_factory is dict:
            default = None
        switch = f"--{each.name}/--no_{each.name}" if kind in (bool, Optional[bool]) else f"--{each.name}"
        switch = f"--{each.name}" if each.name == "resume" else switch
        metavar = "JSON" if each.default_factory is dict else None
        checked = one_of(METHODS) if each.name == "method" else {}
        option = typer.Option(switch, help=_help(each), metavar=metavar, hidden=each.metadata["advanced"], **checked)
        made.append(
            inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
            )
        )
    parameters = [*own, *made]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _help(field: Field[Any]) -> str:
    """Return what a field is and its default; the other sentences of its help are for Python."""
    first, *others = field.metadata["help"].removesuffix(".").split(". ")
    shown = [first, *(sentence for sentence in others if sentence.startswith("Default:"))]
    return f"{'. '.join(shown)}. {_MORE.get(field.name, '')}".rstrip()


@_with_config
def search(
    examples: Annotated[str, typer.Option("--data", "--examples", help=f"{DATA[0].upper()}{DATA[1:]}.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where to save the mixture.")],
    model_name_or_path: ModelOption = None,
    expert: ExpertOption = None,
    library: LibraryOption = None,
    reward: Annotated[
        str,
        typer.Option(
            "--reward",
            help="exact, contains, number, choice, regex, math_verify, rewards.py:function, a dotted path, or loglik.",
        ),
    ] = "exact",
    tie_break: Annotated[
        float, typer.Option("--tie_break", help="Weight of the log-likelihood, added to the reward.", hidden=True)
    ] = 0.0,
    prompt_column: PromptColumnOption = "prompt",
    completion_column: CompletionColumnOption = None,
    answer_column: AnswerColumnOption = None,
    messages_column: MessagesColumnOption = "messages",
    chat: ChatOption = False,
    system_prompt: Annotated[
        Optional[str], typer.Option("--system_prompt", help="Ask prompts as chat messages, after this one.")
    ] = None,
    dataset_config: Annotated[
        Optional[str], typer.Option("--dataset_config", help="Configuration of a dataset.", hidden=True)
    ] = None,
    dataset_split: Annotated[
        Optional[str], typer.Option("--dataset_split", help="Split of a dataset. Default: train.", hidden=True)
    ] = None,
    limit: Annotated[
        Optional[int], typer.Option("--limit", help="Only the first examples.", min=1, hidden=True)
    ] = None,
    show_answers: Annotated[
        int, typer.Option("--show_answers", help="Print this many answers of the result.", min=0, hidden=True)
    ] = 0,
    dtype: DtypeOption = "auto",
    base_check: CheckOption = "error",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    help_all: Annotated[
        bool, typer.Option("--help_all", help="Show all options.", is_eager=True, callback=_show_all)
    ] = False,
    **settings: Any,
) -> None:
    """Search a mixture of experts from a few examples.

    peft-svf search --model_name_or_path MODEL --expert math=experts/math --expert logic=experts/logic
    --data shots.jsonl --reward number --output_dir my-mixture
    """
    checkpoint = output_dir / "search-checkpoint.json"
    try:
        chosen = chosen_experts(model_name_or_path, expert, library)
        check_reward(reward)
        for name, path in chosen.places.items():
            if output_dir.resolve() == Path(path).resolve():
                raise ValueError(f"--output_dir {output_dir} is the folder of expert {name!r}. Pass another folder.")
        check_output(output_dir, ADAPTER, overwrite, resume=settings["resume"] or checkpoint.exists())
        validation, eval_examples = settings.pop("validation"), None
        held_out = _is_data(_number_or_word(validation))
        config = SearchConfig(
            **{name: _value(name, value) for name, value in settings.items()},
            validation="auto" if held_out else _number_or_word(validation),
            checkpoint=str(checkpoint),
        )
        check_dtype(dtype)
        from ..mixture.mixture import AdaptiveMixture
        from ..scoring.datasets import load_examples
        from ..scoring.objectives import LogLikelihoodObjective, RewardObjective, WeightedObjective
        from ..scoring.rewards import find_reward
        from ..search.loop import EQUAL_SCORES
        from ..utils.processes import by_main_process, leave, processes

        columns: dict[str, Any] = {
            "prompt_column": prompt_column,
            "completion_column": completion_column,
            "answer_column": answer_column,
            "messages_column": messages_column,
            "chat": chat,
            "system_prompt": system_prompt,
            "split": dataset_split,
            "config": dataset_config,
        }
        rows = load_examples(examples, **columns, limit=limit)
        eval_examples = load_examples(validation, **columns) if held_out else None
        function = None if reward == "loglik" else find_reward(reward)
        mixture = AdaptiveMixture.from_pretrained(
            chosen.base_model,
            chosen.every,
            base_check=base_check,
            dtype=dtype,
            **chosen.options,
        )
        tell_dtype(mixture.model, dtype)
        if function is None:
            data: dict[str, Any] = {"objective": LogLikelihoodObjective(rows, mixture.tokenizer)}
            config = config.changed(max_new_tokens=SearchConfig.max_new_tokens)
        elif tie_break:
            generation = {"max_new_tokens": config.max_new_tokens, **config.generation_kwargs}
            parts = [
                RewardObjective(rows, function, mixture.tokenizer, generation_kwargs=generation),
                LogLikelihoodObjective(rows, mixture.tokenizer),
            ]
            data = {"objective": WeightedObjective(parts, [1.0, tie_break])}
            config = config.changed(max_new_tokens=SearchConfig.max_new_tokens, generation_kwargs={})
        else:
            data = {"examples": rows, "reward_funcs": function}
        if overwrite and not config.resume:
            by_main_process(lambda: checkpoint.unlink(missing_ok=True))
        with prints_to_stderr(as_json):
            result = mixture.search(**data, config=config, eval_examples=eval_examples)
        failed = result.stopped == EQUAL_SCORES
        if (shown := 3 if failed else show_answers) and function is not None:
            texts = _answers(mixture, rows[:shown], function, config)
            if processes().is_main_process:
                print("\n".join(texts), file=sys.stderr)
        if failed:
            checkpoint.unlink(missing_ok=True)
            leave()
            raise ValueError(
                "Nothing is saved, because no mixture is better than another. Compare the answers above with --reward "
                f"{reward}: it must accept their form."
            )
        by_main_process(lambda: mixture.save_pretrained(output_dir))
        leave()
    except EXPECTED as error:
        fail(error)
    if not processes().is_main_process:
        return
    if result.stopped == "interrupted":
        print(f"Interrupted. `--resume` continues from {checkpoint}.", file=sys.stderr)
    else:
        checkpoint.unlink(missing_ok=True)
    plotted = " with search.png" if drawn(result, output_dir / "search.png") else ""
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    table = Table("", result.objective, "95 % interval", title=f"evaluated on: {result.evaluated_on}")
    for name, score in result.scores.items():
        low, high = result.intervals[name]
        table.add_row(name, f"{score:.3f}", f"{low:.3f} to {high:.3f}", style="bold" if name == result.choice else None)
    console = Console()
    console.print(table)
    console.print(str(result), highlight=False, markup=False)
    console.print(f"saved in {output_dir}{plotted}", highlight=False, markup=False)


def _answers(mixture: Any, rows: list[dict[str, Any]], function: Any, config: SearchConfig) -> list[str]:
    """Return the question, the answer of the mixture and the reference answer of each example."""
    from ..scoring.objectives import RewardObjective
    from ..scoring.rewards import text_of

    generation = {"max_new_tokens": config.max_new_tokens, **config.generation_kwargs}
    objective = RewardObjective(rows, function, mixture.tokenizer, generation_kwargs=generation)
    answers = objective.answers(mixture.model, range(len(rows)))
    texts = mixture.tokenizer.batch_decode(answers, skip_special_tokens=True)
    asked = [row["prompt"] if isinstance(row["prompt"], str) else text_of(row["prompt"]) for row in rows]
    return [
        f"prompt: {prompt!r}\nanswer: {text!r}\nreference: {row.get('answer')!r}\n"
        for prompt, text, row in zip(asked, texts, rows, strict=True)
    ]


def _value(name: str, value: Any) -> Any:
    """Return the value of an option as the field takes it: dicts come as JSON."""
    if name in ("optimizer_kwargs", "generation_kwargs"):
        value = "{}" if value is None else value
    elif name != "granularity" or not str(value).startswith("{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} must be JSON, got {value!r}: {error}.") from error


def _is_data(validation: Any) -> bool:
    """Whether the value of `--validation` names data, as far as that is known before anything heavy is imported."""
    if not isinstance(validation, str):
        return False
    place = validation.partition(":")[0]
    return Path(place).suffix != "" or Path(place).exists()


def _number_or_word(text: str | None) -> Any:
    if text in (None, "none"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
