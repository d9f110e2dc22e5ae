"""Options that several commands share, and the checks of their values."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .choices import BASE_CHECKS, one_of

if TYPE_CHECKING:
    from ..library import ExpertLibrary

DATA = "a .jsonl, .json, .csv or .parquet file, a folder or a Hub id[:SPLIT]"

ModelOption = Annotated[
    Optional[str],
    typer.Option("--model_name_or_path", help="Hub id or folder. Default: that of --library."),
]
ExpertOption = Annotated[
    Optional[list[str]],
    typer.Option("--expert", metavar="NAME=PATH", help="An expert: Hub id or folder. Repeatable."),
]
LibraryOption = Annotated[
    Optional[str], typer.Option("--library", metavar="FOLDER", help="Experts: folder or Hub id of a library.")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Of the base model: auto, float32, bfloat16, ...")]
CheckOption = Annotated[
    Any,  # a word that `one_of` has checked
    typer.Option(
        "--base_check",
        metavar="<str>",
        parser=str,
        help="If an adapter was made for another base model: error, warn or ignore.",
        **one_of(BASE_CHECKS),
    ),
]
BatchOption = Annotated[
    Optional[int], typer.Option("--batch_size", help="Batch rows. Default: found automatically.", min=1)
]
NewTokensOption = Annotated[int, typer.Option("--max_new_tokens", help="Longest answer, in tokens.", min=1)]
PromptColumnOption = Annotated[str, typer.Option("--prompt_column", help="Column with text or messages.")]
CompletionColumnOption = Annotated[
    Optional[str], typer.Option("--completion_column", help="Column with the answer to learn.", hidden=True)
]
AnswerColumnOption = Annotated[
    Optional[str], typer.Option("--answer_column", help="Default: answer, solution or completion.")
]
MessagesColumnOption = Annotated[
    str, typer.Option("--messages_column", help="Column with conversations, if there are no prompts.", hidden=True)
]
ChatOption = Annotated[bool, typer.Option("--chat", help="Ask text prompts as messages of a chat.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def data_columns(
    prompt_column: PromptColumnOption = "prompt",
    completion_column: CompletionColumnOption = None,
    answer_column: AnswerColumnOption = None,
    messages_column: MessagesColumnOption = "messages",
) -> dict[str, Any]:
    """Return the columns of the data, as arguments of `load_examples`."""
    columns = {"prompt_column": prompt_column, "messages_column": messages_column}
    return {**columns, "completion_column": completion_column, "answer_column": answer_column}


def takes(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the parameters of these functions to the options of a command, which gets them as `**options`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        every = [
            its for each in (*functions, command) for its in inspect.signature(each, eval_str=True).parameters.values()
        ]
        own = [its.replace(kind=its.KEYWORD_ONLY) for its in every if its.kind != its.VAR_KEYWORD]
        command.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        command.__annotations__ = {its.name: its.annotation for its in own}
        return command

    return decorate


def call(function: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Call one of the functions of [`takes`] with its options."""
    return function(**{name: options[name] for name in inspect.signature(function).parameters})


def pairs(option: str, texts: Sequence[str] | None, form: str) -> list[tuple[str, str]]:
    """Return the two parts of each `NAME=VALUE`.

    Raises:
        ValueError: A text has another form.
    """
    found = []
    for text in texts or []:
        name, _, value = text.partition("=")
        if not (name and value):
            raise ValueError(f"{option} must be {form}, got {text!r}.")
        found.append((name, value))
    return found


def named(option: str, texts: Sequence[str] | None, form: str) -> dict[str, str]:
    """Return the values of `NAME=VALUE` texts by name.

    Raises:
        ValueError: A text has another form, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for name, value in pairs(option, texts, form):
        if name in found:
            raise ValueError(f"{option} {name} is given twice, as {found[name]!r} and {value!r}.")
        found[name] = value
    return found


def named_experts(texts: Sequence[str]) -> dict[str, str]:
    """Return the values of `--expert`; see [`named`]."""
    return named("--expert", texts, "NAME=PATH, such as math=experts/math")


@dataclass(frozen=True)
class Experts:
    """
    The base model and the experts of a command.

    Attributes:
        base_model: Hub id or folder of the base model.
        every: The experts, for [`load_experts`]: those of `--library` and `--expert`.
        places: Folder or Hub id of each expert.
        library: The same experts, if there is a library.
        options: Arguments of `AutoModelForCausalLM.from_pretrained`.
    """

    base_model: str
    every: Mapping[str, str] | ExpertLibrary
    places: Mapping[str, str]
    library: ExpertLibrary | None
    options: Mapping[str, Any]


def chosen_experts(model: str | None, texts: Sequence[str] | None, library: str | None) -> Experts:
    """Return what `--model_name_or_path`, `--expert` and `--library` name.

    Raises:
        typer.BadParameter: An option is missing.
        ValueError: The library has no experts or names no base model, a name occurs twice, or the library is damaged.
        FileNotFoundError: There is no such library.
    """
    experts = named_experts(texts or [])
    if library is None:
        if not experts:
            raise typer.BadParameter("It is missing. Pass it, or a --library.", param_hint="--expert")
        if model is None:
            raise typer.BadParameter("It is missing. Pass it, or a --library.", param_hint="--model_name_or_path")
        return Experts(model, experts, experts, None, {})
    from ..library import ExpertLibrary

    found = ExpertLibrary.from_pretrained(library)
    for name, path in experts.items():
        found.include(name, path)
    base, revision = model or found.base_model, None if model else found.base_revision
    if not found:
        raise ValueError(f"The library {library} has no experts. Add one with `peft-svf library add`.")
    if base is None:
        raise ValueError(f"The library {library} names no base model. Pass --model_name_or_path.")
    return Experts(base, found, found.sources, found, {"revision": revision} if revision else {})


def check_dtype(dtype: str) -> None:
    """Check the value of `--dtype`.

    Raises:
        ValueError: The value is no dtype.
    """
    import torch

    kind = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"--dtype must be auto or a torch dtype such as float32, got {dtype!r}.")


def tell_dtype(model: Any, asked: str) -> None:
    """Say in which dtype a base model runs on a CPU, if it was not asked for."""
    import torch

    from ..utils.processes import processes

    if asked == "auto" and model.device.type == "cpu" and model.dtype == torch.float32 and processes().is_main_process:
        print("The base model runs in float32 on the CPU. --dtype bfloat16 needs half the memory.", file=sys.stderr)


def check_device(device: str) -> None:
    """Check the value of `--device`.

    Raises:
        ValueError: torch does not have the device.
    """
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch is built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {device!r} cannot be used: {reason}. Pass cpu, or a device such as cuda."
        ) from error


def drawn(result: Any, path: Path) -> bool:
    """Draw a result and return `True`, or `False` without matplotlib."""
    try:
        result.plot(path)
    except ImportError:
        return False
    return True
