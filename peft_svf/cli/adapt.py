"""`peft-svf generate`, `chat` and `evaluate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from .chat import converse
from .choices import DISPATCHERS, one_of
from .errors import in_a_line, prints_to_stderr, warnings_in_a_line
from .options import (
    DATA,
    BatchOption,
    ChatOption,
    CheckOption,
    DtypeOption,
    ExpertOption,
    JsonOption,
    LibraryOption,
    ModelOption,
    NewTokensOption,
    call,
    check_dtype,
    chosen_experts,
    data_columns,
    drawn,
    named,
    pairs,
    takes,
    tell_dtype,
)
from .output import EVALUATION, OverwriteOption, check_output

if TYPE_CHECKING:
    from ..evaluation.strategies import Evaluation
    from ..library import ExpertLibrary

DescriptionOption = Annotated[
    Optional[list[str]],
    typer.Option("--description", metavar="NAME=TEXT", help="What an expert is for, in a few words (prompt)."),
]
ClassifierOption = Annotated[
    Optional[str], typer.Option("--classifier", metavar="PATH", help="The SVF adapter that classifies (classifier).")
]
LabelOption = Annotated[
    Optional[list[str]],
    typer.Option("--label", metavar="NAME=LABEL", help="Label of an expert. Default: its name (prompt, classifier)."),
]
WeightOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--weight", metavar="NAME=NUMBER", help="Weight of an expert, otherwise 0. Default: all equal (mixture)."
    ),
]


def adaptive_model(
    model_name_or_path: ModelOption = None,
    expert: ExpertOption = None,
    library: LibraryOption = None,
    dispatch: Annotated[
        Optional[str],
        typer.Option(
            "--dispatch",
            help="prompt, classifier, nearest, or mixture: one mixture for all prompts. Default: that of --library, or "
            "prompt.",
            **one_of(DISPATCHERS),
        ),
    ] = None,
    description: DescriptionOption = None,
    classifier: ClassifierOption = None,
    label: LabelOption = None,
    nearest_examples: Annotated[
        Optional[list[str]],
        typer.Option(
            "--nearest_examples",
            metavar="NAME=FILE",
            help="Example prompts of an expert: .txt, .jsonl, .csv (nearest).",
        ),
    ] = None,
    weight: WeightOption = None,
    threshold: Annotated[
        Optional[float],
        typer.Option("--threshold", help="Below this probability (nearest: similarity) the base model answers."),
    ] = None,
    soft: Annotated[bool, typer.Option("--soft", help="Mix the experts by their probabilities.")] = False,
    dtype: DtypeOption = "auto",
    base_check: CheckOption = "error",
) -> Any:
    """Return the [`SelfAdaptiveModel`] that these options describe."""
    chosen = chosen_experts(model_name_or_path, expert, library)
    described = _described(description, label, weight)
    files = named("--nearest_examples", nearest_examples, "NAME=FILE")
    check_dtype(dtype)
    from ..evaluation.dispatchers import make_dispatcher
    from ..mixture.loading import load_experts
    from ..routing.self_adaptive import SelfAdaptiveModel
    from ..scoring.datasets import load_prompts

    method = dispatch or (chosen.library.dispatch.method if chosen.library else "prompt")
    examples = {name: load_prompts(path) for name, path in files.items()}
    options: dict[str, Any] = {**described, "examples": examples}
    options |= {} if threshold is None else {"threshold": threshold}
    if chosen.library:
        options = _with_library(chosen.library, method, options)
    mixture = load_experts(
        chosen.base_model, chosen.every, classifier=classifier, base_check=base_check, dtype=dtype, **chosen.options
    )
    tell_dtype(mixture.model, dtype)
    dispatcher = make_dispatcher(method, mixture, **options)
    return SelfAdaptiveModel(mixture.model, mixture.tokenizer, dispatcher, soft=soft)


def answering(
    system_prompt: Annotated[
        Optional[str], typer.Option("--system_prompt", help="System message for all prompts.")
    ] = None,
    max_new_tokens: NewTokensOption = 256,
    do_sample: Annotated[
        bool, typer.Option("--do_sample/--greedy", help="Sample answers, or take the most probable tokens.")
    ] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="Temperature of --do_sample.")] = 1.0,
) -> dict[str, Any]:
    """Return the arguments of `SelfAdaptiveModel.chat`."""
    options = {"system_prompt": system_prompt, "max_new_tokens": max_new_tokens, "do_sample": do_sample}
    return {**options, "return_details": True} | ({"temperature": temperature} if do_sample else {})


@takes(adaptive_model, answering, data_columns)
def generate(
    prompt: Annotated[Optional[list[str]], typer.Option("--prompt", help="A prompt. May be repeated.")] = None,
    file: Annotated[
        Optional[str], typer.Option("--data", "--file", help=f"Prompts: one per line (.txt), or {DATA}.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Prompts per batch.", min=1)] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per prompt.")] = False,
    **options: Any,
) -> None:
    """Answer prompts, each with its dispatched expert.

    peft-svf generate --model_name_or_path MODEL --expert math=experts/math --expert logic=experts/logic
    --dispatch prompt --description math="sums and equations" --prompt "What is 3 + 4?"
    """
    with in_a_line(), warnings_in_a_line():
        prompts: list[Any] = list(prompt or [])
        if file:
            from ..scoring.datasets import load_prompts

            prompts += load_prompts(file, **call(data_columns, options))
        if not prompts:
            raise ValueError("There is nothing to answer. Pass --prompt or --data.")
        adaptive = call(adaptive_model, options)
        chat_options = call(answering, options)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            found = adaptive.chat(batch, **chat_options)
            for i, asked in enumerate(batch):
                shares = dict(zip(found.dispatch.labels, found.dispatch.probabilities[i].tolist(), strict=True))
                about = {"prompt": asked, "text": found.texts[i], "expert": found.experts[i]}
                about |= {"error": found.errors.get(i), "probabilities": shares}
                if as_json:
                    print(json.dumps(about, ensure_ascii=False))
                else:
                    _show_answer(**about)


@takes(adaptive_model, answering)
def chat(**options: Any) -> None:
    """Talk to a model that adapts to each message. /help lists what you can do.

    peft-svf chat --model_name_or_path MODEL --expert math=experts/math --expert logic=experts/logic
    """
    with in_a_line():
        converse(call(adaptive_model, options), call(answering, options))


def _show_answer(
    prompt: Any, text: str | None, expert: str, error: str | None, probabilities: dict[str, float]
) -> None:
    """Print a prompt, its expert and its answer, each under its name."""
    asked = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    sure = f" ({probabilities[expert]:.2f})" if expert in probabilities else ""
    answer = ("error", error) if text is None else ("answer", text)
    for name, content in (("prompt", asked), ("expert", f"{expert}{sure}"), answer):
        print(f"{name}: {content}")
    print()


@takes(data_columns)
def evaluate(
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            metavar="EXPERT=DATA",
            help="The right expert (`base` if none is), and a recipe (.yaml) or data whose test split is asked.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder for evaluation.json and evaluation.png.")],
    model_name_or_path: ModelOption = None,
    expert: ExpertOption = None,
    library: LibraryOption = None,
    strategy: Annotated[
        Optional[list[str]],
        typer.Option(
            "--strategy",
            help="prompt, classifier, nearest or mixture. May be repeated. Default: prompt.",
            **one_of(DISPATCHERS),
        ),
    ] = None,
    description: DescriptionOption = None,
    classifier: ClassifierOption = None,
    label: LabelOption = None,
    weight: WeightOption = None,
    reward: Annotated[
        str, typer.Option("--reward", help="Reward function for data; see `peft-svf search --help`.")
    ] = "exact",
    system_prompt: Annotated[
        Optional[str], typer.Option("--system_prompt", help="System message for the prompts of data.")
    ] = None,
    chat: ChatOption = False,
    size: Annotated[int, typer.Option("--size", help="Questions of each task, at most.", min=1)] = 64,
    shots: Annotated[
        int,
        typer.Option(
            "--shots",
            help="Example prompts per expert, from its task's training split (nearest). A library's come first.",
            min=1,
        ),
    ] = 16,
    max_new_tokens: Annotated[
        Optional[int],
        typer.Option("--max_new_tokens", help="Longest answer, in tokens. Default: that of a recipe, else 256.", min=1),
    ] = None,
    batch_size: BatchOption = None,
    dtype: DtypeOption = "auto",
    base_check: CheckOption = "error",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an evaluation that was stopped.")] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Compare dispatch strategies by accuracy and time.

    peft-svf evaluate --model_name_or_path MODEL --expert sums=experts/sums --task sums=recipes/sums.yaml
    --task base=recipes/arithmetic.yaml --strategy prompt --strategy nearest --output_dir out
    """
    with in_a_line():
        chosen = chosen_experts(model_name_or_path, expert, library)
        experts, sources = chosen.every, pairs("--task", task, "EXPERT=DATA")
        described = _described(description, label, weight)
        check_output(output_dir, EVALUATION, overwrite, resume=resume)
        check_dtype(dtype)
        from ..evaluation.dispatchers import make_dispatcher
        from ..evaluation.strategies import evaluate as evaluated
        from ..mixture.loading import load_experts
        from ..scoring.names import BASE
        from ..utils.files import write_whole
        from .tasks import evaluation_task

        if unknown := [name for name, _ in sources if name not in (BASE, *experts)]:
            raise ValueError(
                f"--task names {unknown[0]!r}, which is none of the experts {', '.join(experts)}. "
                f"For a task without an expert, pass {BASE}=DATA."
            )
        columns = {**call(data_columns, options), "system_prompt": system_prompt, "chat": chat}
        strategy = strategy or [chosen.library.dispatch.method if chosen.library else "prompt"]
        known = {name for name, its in chosen.library.examples.items() if its} if chosen.library else set()
        tasks, examples = [], {}
        for name, source in sources:
            right = None if name == BASE else name
            wanted = shots if "nearest" in strategy and name not in known else 0
            asked, prompts = evaluation_task(source, right, size=size, shots=wanted, reward=reward, columns=columns)
            tasks.append(asked if max_new_tokens is None else replace(asked, max_new_tokens=max_new_tokens))
            if right and prompts:
                examples[right] = prompts
        mixture = load_experts(
            chosen.base_model, experts, classifier=classifier, base_check=base_check, dtype=dtype, **chosen.options
        )
        tell_dtype(mixture.model, dtype)
        strategies = {}
        for name in strategy:
            about = {**described, "examples": examples if name == "nearest" else None}
            about = _with_library(chosen.library, name, about) if chosen.library else about
            strategies[name] = make_dispatcher(name, mixture, **about)
        if overwrite:
            (output_dir / "scores.json").unlink(missing_ok=True)
        with prints_to_stderr(as_json):
            result = evaluated(
                mixture.model,
                mixture.tokenizer,
                tasks,
                strategies,
                batch_size=batch_size,
                output=output_dir / "scores.json",
                resume=resume,
            )
        output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(output_dir / "evaluation.json", json.dumps(result.to_dict(), indent=1) + "\n")
    drawn(result, output_dir / "evaluation.png")
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        _show(result, Console())


def _show(result: Evaluation, console: Console) -> None:
    table = Table("", *result.tasks, "all", title="accuracy (95 % interval)")
    for name, means in result.accuracy.items():
        ends = result.intervals[name]
        table.add_row(name, *(f"{means[t]:.3f} ({ends[t][0]:.3f} to {ends[t][1]:.3f})" for t in means))
    console.print(table)
    for name, confusion in result.confusion.items():
        columns = list(dict.fromkeys([*confusion, *(label for row in confusion.values() for label in row)]))
        counts = Table("right, chosen", *columns, title=f"{name}: {result.dispatch_accuracy[name]['all']:.3f} right")
        for right, row in confusion.items():
            counts.add_row(right, *(str(row.get(column, 0)) for column in columns))
        console.print(counts)
    for name, times in result.seconds.items():
        console.print(
            f"{name}: {times['prompts']:.0f} prompts in {times['first']:.2f} s (first pass) and {times['second']:.2f} "
            "s (second)",
            highlight=False,
        )


def _with_library(library: ExpertLibrary, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `make_dispatcher`: those of the command, and what a library says in addition."""
    settings = library.dispatch.settings if method == library.dispatch.method else {}
    merged = {**settings, **{name: value for name, value in options.items() if value not in (None, {})}}
    for name, said in (("descriptions", library.descriptions), ("examples", library.examples)):
        merged[name] = {**said, **(options.get(name) or {})}
    return merged


def _described(description: list[str] | None, label: list[str] | None, weight: list[str] | None) -> dict[str, Any]:
    """What the options say about the experts, as arguments of `make_dispatcher`."""
    weights = named("--weight", weight, "NAME=NUMBER")
    try:
        numbers = {name: float(value) for name, value in weights.items()}
    except ValueError as error:
        raise ValueError(f"--weight must be NAME=NUMBER: {error}.") from error
    return {
        "descriptions": named("--description", description, "NAME=TEXT"),
        "labels": named("--label", label, "NAME=LABEL"),
        "weights": numbers or None,
    }
