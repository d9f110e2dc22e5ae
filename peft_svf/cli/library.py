"""`peft-svf library`: experts of one base model, with what dispatch needs to know about them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from .choices import one_of
from .errors import in_a_line
from .options import JsonOption, named, pairs
from .output import OverwriteOption

METHODS = ("prompt", "classifier", "nearest")  # a test compares it with the format of the file

library = typer.Typer(no_args_is_help=True, help="Experts of one base model in a folder, for --library.")
FolderArgument = Annotated[str, typer.Argument(metavar="LIBRARY", help="The folder of the library.")]
PlaceArgument = Annotated[str, typer.Argument(metavar="LIBRARY", help="Folder or Hub id of the library.")]


@library.command()
def add(
    folder: FolderArgument,
    expert: Annotated[str, typer.Argument(metavar="NAME=PATH", help="An expert: a folder or a Hub id.")],
    description: Annotated[Optional[str], typer.Option("--description", help="What it is for, in a few words.")] = None,
    examples: Annotated[
        Optional[str],
        typer.Option("--examples", metavar="FILE", help="Prompts it is for: .txt, .jsonl, .csv. Default: its card's."),
    ] = None,
    score: Annotated[
        Optional[list[str]],
        typer.Option("--score", metavar="NAME=NUMBER", help="A result of an evaluation. Default: its training's."),
    ] = None,
    revision: Annotated[
        Optional[str], typer.Option("--revision", help="Revision on the Hub. Its present commit is recorded.")
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Refer to the folder by its absolute path. Default: copy the expert.")
    ] = False,
    model_name_or_path: Annotated[
        Optional[str], typer.Option("--model_name_or_path", help="The base model. Default: that of the first expert.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add an expert to a library, which is made if there is none. No file of another expert changes.

    peft-svf library add my-library math=experts/math --description "sums and equations" --examples prompts.txt
    """
    with in_a_line():
        name, place = pairs("The expert", [expert], "NAME=PATH, such as math=experts/math")[0]
        scores = {name: _number(value) for name, value in named("--score", score, "NAME=NUMBER").items()}
        from ..library import ExpertLibrary
        from ..scoring.datasets import load_prompts

        prompts = load_prompts(examples) if examples else None
        with ExpertLibrary.edit(folder) as edited:
            if name in edited and not overwrite:
                raise ValueError(f"{folder} has an expert {name!r} already. Pass --overwrite to replace it.")
            if model_name_or_path is not None:
                edited.base_model, edited.base_revision = model_name_or_path, None
            edited.add(
                name, place, revision=revision, description=description, examples=prompts, scores=scores or None,
                link=link, overwrite=overwrite,
            )  # fmt: skip
        source = edited.sources[name]
    print(json.dumps({"library": folder, "expert": name, "source": source}) if as_json else f"{name}: {source}")


@library.command()
def remove(
    folder: FolderArgument, name: Annotated[str, typer.Argument(help="The expert.")], as_json: JsonOption = False
) -> None:
    """Remove an expert from a library. Its files stay.

    peft-svf library remove my-library math
    """
    with in_a_line():
        from ..library import ExpertLibrary

        with ExpertLibrary.edit(folder, create=False) as edited:
            source = edited.sources.get(name)
            edited.remove(name)
    print(json.dumps({"library": folder, "removed": name, "source": source}) if as_json else f"{source} is kept")


@library.command()
def dispatch(
    folder: FolderArgument,
    method: Annotated[str, typer.Argument(help="prompt, classifier or nearest.", **one_of(METHODS))],
    classifier: Annotated[
        Optional[str], typer.Option("--classifier", metavar="PATH", help="The adapter that classifies (classifier).")
    ] = None,
    setting: Annotated[
        Optional[list[str]],
        typer.Option("--setting", metavar="NAME=JSON", help="An argument of the dispatcher, such as threshold=0.5."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Set the dispatcher of a library.

    peft-svf library dispatch my-library classifier --classifier experts/classifier --setting threshold=0.5
    """
    with in_a_line():
        settings = {name: _json(name, value) for name, value in named("--setting", setting, "NAME=JSON").items()}
        from ..library import ExpertLibrary

        with ExpertLibrary.edit(folder, create=False) as edited:
            edited.set_dispatch(method, classifier=classifier, **settings)
    about = {"library": folder, "method": method, "classifier": classifier, "settings": settings}
    print(json.dumps(about) if as_json else repr(edited))


@library.command("list")
def list_command(folder: PlaceArgument, as_json: JsonOption = False) -> None:
    """List the experts of a library.

    peft-svf library list my-library
    """
    with in_a_line():
        from ..library import ExpertLibrary

        found = ExpertLibrary.from_pretrained(folder)
    if as_json:
        print(json.dumps(_listed(found), indent=1, ensure_ascii=False))
        return
    table = Table("expert", Column("source", overflow="fold"), "description", "examples", "scores")
    for name, expert in found.items():
        scores = ", ".join(f"{each} {value:.3g}" for each, value in expert.scores.items())
        cells = (name, str(expert.source), expert.description, str(len(expert.examples)), scores)
        table.add_row(*map(escape, cells))
    console = Console()
    console.print(table)
    console.print(f"base model: {found.base_model}", highlight=False, markup=False)
    console.print(f"dispatch: {found.dispatch.method}", highlight=False, markup=False)


@library.command()
def check(folder: PlaceArgument, as_json: JsonOption = False) -> None:
    """Check all adapters of a library: they are whole, and made for one base model. The exit status is 1 if not.

    peft-svf library check my-library
    """
    with in_a_line():
        from ..library import ExpertLibrary

        found = ExpertLibrary.from_pretrained(folder)
        problems = found.check()
    if as_json:
        print(json.dumps({"experts": list(found), "problems": problems}, indent=1))
    elif problems:
        for name, problem in problems.items():
            Console().print(f"{name}: {problem}", highlight=False, markup=False, soft_wrap=True)
    else:
        print(f"{len(found)} experts, all whole and made for one base model")
    raise typer.Exit(int(bool(problems)))


def _listed(found: Any) -> dict[str, Any]:
    experts = [
        {
            "name": name,
            "source": str(expert.source),
            "description": expert.description,
            "examples": list(expert.examples),
            "scores": dict(expert.scores),
        }
        for name, expert in found.items()
    ]
    rule = found.dispatch
    dispatch = {"method": rule.method, "settings": dict(rule.settings)}
    if rule.classifier is not None:
        dispatch["classifier"] = str(rule.classifier)
    return {"base_model": found.base_model, "experts": experts, "dispatch": dispatch}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"--score must be NAME=NUMBER: {error}.") from error


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--setting {name} must be JSON, such as 0.5, true or {{}}, got {text!r}: {error}.") from error
