"""The command line: one thin command per capability."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit("The command line needs typer and rich: `pip install peft-svf[cli]`.") from error

from .errors import fail, show_tracebacks
from .files import files
from .search import named as _named
from .search import search

if TYPE_CHECKING:
    from ..evaluation.strategies import Evaluation
    from ..mixture.result import MixtureResult
    from ..routing.self_adaptive import SelfAdaptiveModel

app = typer.Typer(
    name="peft-svf",
    help="Transformer² for PEFT: expert vectors, trained by reinforcement learning and mixed at inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False) -> None:
    show_tracebacks(debug)


app.add_typer(files)
app.command()(search)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[--config RECIPE.yaml] [--OPTION VALUE]...",
)
def train(context: typer.Context) -> None:
    """Train an expert: GRPO, RLOO or the paper's REINFORCE. `--help_all` lists all options, of TRL too.

    peft-svf train --config recipe.yaml --model_name_or_path MODEL --output_dir experts/math

    For several processes: `accelerate launch -m peft_svf.training.run` with the same options. `--json` prints what is
    in `training.json`, and all else to standard error.
    """
    as_json = "--json" in context.args
    context.args = ["--help" if word == "--help_all" else word for word in context.args if word != "--json"]
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # the user's own rewards may print, too
        try:
            from ..training.run import prepare

            run = prepare(context.args)
        except (ValueError, ImportError, OSError) as error:
            fail(error)
        record = run()
    if as_json:
        print(json.dumps(record.to_dict(), default=str))


# ---------------------------------------------------------------------------------------------------- adapting

ModelOption = Annotated[str, typer.Option("--model_name_or_path", help="The base model.")]
ExpertOption = Annotated[list[str], typer.Option("--expert", metavar="NAME=PATH", help="An expert; at least one.")]
DispatchOption = Annotated[
    str, typer.Option("--dispatch", help="prompt, classifier, nearest, or mixture: one for all prompts.")
]
DescriptionOption = Annotated[
    Optional[list[str]],
    typer.Option("--description", metavar="NAME=TEXT", help="What an expert is for, in a few words (prompt)."),
]
ClassifierOption = Annotated[
    Optional[str], typer.Option("--classifier", metavar="PATH", help="The SVF adapter that classifies (classifier).")
]
LabelOption = Annotated[
    Optional[list[str]],
    typer.Option("--label", metavar="NAME=LABEL", help="What the classifier calls an expert, if not by its name."),
]
NearestOption = Annotated[
    Optional[list[str]],
    typer.Option("--nearest_examples", metavar="NAME=FILE", help="Prompts of an expert: .txt, .jsonl, .csv (nearest)."),
]
WeightOption = Annotated[
    Optional[list[str]],
    typer.Option("--weight", metavar="NAME=NUMBER", help="Of an expert, others 0 (mixture; default: uniform)."),
]
ThresholdOption = Annotated[
    Optional[float],
    typer.Option("--threshold", help="Least probability (nearest: similarity) for an expert; else the base model."),
]
SystemOption = Annotated[Optional[str], typer.Option("--system_prompt", help="Before the prompts.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Of the base model: auto, float32, bfloat16, ...")]
CheckOption = Annotated[
    str, typer.Option("--base_check", help="error, warn or ignore, if an expert is for another base model.")
]
NewTokensOption = Annotated[int, typer.Option("--max_new_tokens", help="Of an answer.", min=1)]
SampleOption = Annotated[bool, typer.Option("--do_sample/--greedy", help="Sample, or the most probable answer.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="Of sampling.")]


@app.command()
def generate(
    model_name_or_path: ModelOption,
    expert: ExpertOption,
    prompt: Annotated[Optional[list[str]], typer.Option("--prompt", help="A prompt; may be repeated.")] = None,
    file: Annotated[
        Optional[str],
        typer.Option("--file", help="Prompts: a line each (.txt), or the column `prompt` (.jsonl, .json, .csv)."),
    ] = None,
    dispatch: DispatchOption = "prompt",
    description: DescriptionOption = None,
    classifier: ClassifierOption = None,
    label: LabelOption = None,
    nearest_examples: NearestOption = None,
    weight: WeightOption = None,
    threshold: ThresholdOption = None,
    soft: Annotated[bool, typer.Option("--soft", help="Mix the experts by their probabilities.")] = False,
    system_prompt: SystemOption = None,
    max_new_tokens: NewTokensOption = 256,
    do_sample: SampleOption = False,
    temperature: TemperatureOption = 1.0,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Prompts at once.", min=1)] = 32,
    dtype: DtypeOption = "auto",
    base_check: CheckOption = "error",
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each prompt, with its expert.")] = False,
) -> None:
    """Answer prompts, each by the expert for it.

    peft-svf generate --model_name_or_path MODEL --expert math=experts/math --expert logic=experts/logic
    --dispatch prompt --description math="sums and equations" --prompt "What is 3 + 4?"
    """
    try:
        prompts: list[Any] = [*(prompt or []), *(_prompts(file) if file else [])]
        if not prompts:
            raise ValueError("There is nothing to answer; pass --prompt or --file.")
        adaptive = _adaptive(
            model_name_or_path, expert, dispatch, description, classifier, label, nearest_examples, weight, threshold,
            soft, dtype, base_check,
        )  # fmt: skip
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    options = _sampling(max_new_tokens, do_sample, temperature)
    console = Console()
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        found = adaptive.chat(batch, system_prompt=system_prompt, return_details=True, **options)
        for i, (asked, text, chosen) in enumerate(zip(batch, found.texts, found.experts, strict=True)):
            if as_json:
                shares = None if found.dispatch is None else found.dispatch.probabilities[i].tolist()
                about = {"prompt": asked, "text": text, "expert": chosen, "error": found.errors.get(i)}
                if found.dispatch is not None:
                    about["probabilities"] = dict(zip(found.dispatch.labels, shares or [], strict=True))
                print(json.dumps(about, ensure_ascii=False))
            else:
                console.print(f"[bold]{chosen}[/]", end=" ")
                console.print(text if text is not None else found.errors[i], highlight=False, markup=False)


@app.command()
def chat(
    model_name_or_path: ModelOption,
    expert: ExpertOption,
    dispatch: DispatchOption = "prompt",
    description: DescriptionOption = None,
    classifier: ClassifierOption = None,
    label: LabelOption = None,
    nearest_examples: NearestOption = None,
    weight: WeightOption = None,
    threshold: ThresholdOption = None,
    soft: Annotated[bool, typer.Option("--soft", help="Mix the experts by their probabilities.")] = False,
    system_prompt: SystemOption = None,
    max_new_tokens: NewTokensOption = 256,
    do_sample: SampleOption = False,
    temperature: TemperatureOption = 1.0,
    dtype: DtypeOption = "auto",
    base_check: CheckOption = "error",
) -> None:
    """Talk to a model that picks an expert for each of your messages. An empty line ends it, /clear begins anew.

    peft-svf chat --model_name_or_path MODEL --expert math=experts/math --expert logic=experts/logic
    """
    try:
        adaptive = _adaptive(
            model_name_or_path, expert, dispatch, description, classifier, label, nearest_examples, weight, threshold,
            soft, dtype, base_check,
        )  # fmt: skip
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    from transformers import TextStreamer

    console, options = Console(), _sampling(max_new_tokens, do_sample, temperature)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not text:
            break
        if text == "/clear":
            messages = []
            continue
        messages.append({"role": "user", "content": text})
        streamer = TextStreamer(adaptive.tokenizer, skip_prompt=True, skip_special_tokens=True)
        found = adaptive.chat(messages, system_prompt=system_prompt, streamer=streamer, return_details=True, **options)
        console.print(f"[dim]({found.experts[0]}, {found.seconds['first']:.1f} + {found.seconds['second']:.1f} s)[/]")
        if found.texts[0] is None:
            console.print(found.errors[0], markup=False)
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": found.texts[0]})


@app.command()
def evaluate(
    model_name_or_path: ModelOption,
    expert: ExpertOption,
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            metavar="EXPERT=RECIPE",
            help="Questions: the test split of a recipe's task, and the "
            "expert that is right for it; `other` if none is.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="For evaluation.json and evaluation.png.")],
    strategy: Annotated[
        Optional[list[str]], typer.Option("--strategy", help="prompt, classifier, nearest, mixture; default: prompt.")
    ] = None,
    description: DescriptionOption = None,
    classifier: ClassifierOption = None,
    label: LabelOption = None,
    weight: WeightOption = None,
    size: Annotated[int, typer.Option("--size", help="Questions of each task, at most.", min=1)] = 64,
    shots: Annotated[
        int, typer.Option("--shots", help="Training prompts of each expert's task as examples (nearest).", min=1)
    ] = 16,
    max_new_tokens: NewTokensOption = 256,
    batch_size: Annotated[Optional[int], typer.Option("--batch_size", help="Rows per batch; found by itself.")] = None,
    dtype: DtypeOption = "auto",
    base_check: CheckOption = "error",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an evaluation that was stopped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Compare strategies: accuracy by task, where the prompts went, and the time of the two passes.

    peft-svf evaluate --model_name_or_path MODEL --expert sums=experts/sums --task sums=recipes/sums.yaml
    --task other=recipes/arithmetic.yaml --strategy prompt --strategy nearest --output_dir out
    """
    try:
        from ..evaluation.strategies import EvaluationTask, make_dispatcher
        from ..evaluation.strategies import evaluate as evaluated
        from ..mixture.loading import load_experts
        from ..training.run import recipe_task

        experts, chosen = _named(expert), strategy or ["prompt"]
        named = [(name, path) for name, _, path in (text.partition("=") for text in task)]
        if wrong := [text for text, (name, path) in zip(task, named, strict=True) if not (name and path)]:
            raise ValueError(f"--task must be EXPERT=RECIPE, got {wrong[0]!r}.")
        if unknown := [name for name, _ in named if name != "other" and name not in experts]:
            raise ValueError(f"--task names {unknown[0]!r}, which is none of the experts {', '.join(experts)}.")
        found = [(name, Path(path), recipe_task(path)) for name, path in named]
        tasks = [
            EvaluationTask(path.stem, list(its.examples("test", size)), its.reward, None if name == "other" else name)
            for name, path, its in found
        ]
        prompts = {
            name: [row["prompt"] for row in its.examples("train", shots)] for name, _, its in found if name != "other"
        }
        mixture = load_experts(model_name_or_path, experts, classifier=classifier, base_check=base_check, dtype=dtype)
        about = {
            "descriptions": _pairs("--description", description),
            "labels": _pairs("--label", label),
            "weights": _weights(weight),
        }
        strategies = {
            name: make_dispatcher(name, mixture, examples=prompts if name == "nearest" else None, **about)  # type: ignore[arg-type]
            for name in chosen
        }
        result = evaluated(
            mixture.model,
            mixture.tokenizer,
            tasks,
            strategies,
            generation_kwargs={"max_new_tokens": max_new_tokens},
            batch_size=batch_size,
            output=output_dir / "scores.json",
            resume=resume,
        )
        output_dir.mkdir(parents=True, exist_ok=True)
        from ..utils.files import write_whole

        write_whole(output_dir / "evaluation.json", json.dumps(result.to_dict(), indent=1) + "\n")
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    _plotted(result, output_dir / "evaluation.png")
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    console = Console()
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


def _adaptive(
    model_name_or_path: str,
    expert: list[str],
    dispatch: str,
    description: list[str] | None,
    classifier: str | None,
    label: list[str] | None,
    nearest_examples: list[str] | None,
    weight: list[str] | None,
    threshold: float | None,
    soft: bool,
    dtype: str,
    base_check: str,
) -> SelfAdaptiveModel:
    from ..evaluation.strategies import make_dispatcher
    from ..mixture.loading import load_experts
    from ..routing.self_adaptive import SelfAdaptiveModel

    mixture = load_experts(
        model_name_or_path, _named(expert), classifier=classifier, base_check=base_check, dtype=dtype
    )
    options: dict[str, Any] = {} if threshold is None else {"threshold": threshold}
    dispatcher = make_dispatcher(
        dispatch,
        mixture,
        descriptions=_pairs("--description", description),
        labels=_pairs("--label", label),
        examples={name: _prompts(path) for name, path in _pairs("--nearest_examples", nearest_examples).items()},
        weights=_weights(weight),
        **options,
    )
    return SelfAdaptiveModel(mixture.model, mixture.tokenizer, dispatcher, soft=soft)


def _prompts(path: str) -> list[Any]:
    from ..scoring.datasets import load_examples

    if Path(path).suffix == ".txt":
        return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    return [row["prompt"] for row in load_examples(path)]


def _pairs(option: str, texts: list[str] | None) -> dict[str, str]:
    """Of `NAME=TEXT`."""
    found = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} must be NAME=..., got {text!r}.")
        found[name] = value
    return found


def _weights(texts: list[str] | None) -> dict[str, float] | None:
    pairs = _pairs("--weight", texts)
    try:
        return {name: float(value) for name, value in pairs.items()} or None
    except ValueError as error:
        raise ValueError(f"--weight must be NAME=NUMBER: {error}.") from error


def _sampling(max_new_tokens: int, do_sample: bool, temperature: float) -> dict[str, Any]:
    return {"max_new_tokens": max_new_tokens, "do_sample": do_sample} | (
        {"temperature": temperature} if do_sample else {}
    )


def _plotted(result: MixtureResult | Evaluation, path: Path) -> bool:
    """Draw it, if matplotlib is there."""
    try:
        result.plot(path)
    except ImportError:
        return False
    return True


def main() -> None:
    """Entry point of the console script `peft-svf`."""
    app()
