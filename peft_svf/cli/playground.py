"""`peft-svf playground`: a page in the browser."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from .choices import CHOOSERS, one_of
from .errors import in_a_line
from .options import CheckOption, DtypeOption, NewTokensOption, check_dtype, named, named_experts


def playground(
    model_name_or_path: Annotated[
        Optional[str], typer.Option("--model_name_or_path", help="The base model: a Hub id or a folder.")
    ] = None,
    expert: Annotated[
        Optional[list[str]],
        typer.Option("--expert", metavar="NAME=PATH", help="An expert: a Hub id or a folder. May be repeated."),
    ] = None,
    library: Annotated[
        Optional[str], typer.Option("--library", metavar="FOLDER", help="A folder of experts, by subfolder.")
    ] = None,
    dispatch: Annotated[
        str,
        typer.Option("--dispatch", help="How `auto` chooses: prompt, nearest or classifier.", **one_of(CHOOSERS)),
    ] = "prompt",
    about: Annotated[
        Optional[list[str]],
        typer.Option(
            "--about",
            metavar="NAME=TEXT",
            help="What an expert is for (prompt), a file of example prompts (nearest), or its label (classifier).",
        ),
    ] = None,
    classifier: Annotated[
        Optional[str],
        typer.Option("--classifier", metavar="PATH", help="The SVF adapter that classifies (classifier)."),
    ] = None,
    system_prompt: Annotated[
        Optional[str], typer.Option("--system_prompt", help="System message for all prompts.")
    ] = None,
    max_new_tokens: NewTokensOption = 256,
    dtype: DtypeOption = "auto",
    base_check: CheckOption = "error",
    port: Annotated[
        Optional[int],
        typer.Option("--port", help="Port on this machine. Default: the first free from 7860.", min=1, max=65535),
    ] = None,
) -> None:
    """Try experts in the browser: chat, mixtures, dispatch, search and δ.

    The page is for this machine only, at 127.0.0.1. Without a model it asks for one.

    peft-svf playground --model_name_or_path MODEL --library experts
    """
    with in_a_line():
        named_experts(expert or [])
        named("--about", about, "NAME=TEXT")
        check_dtype(dtype)
        try:
            from ..playground.page import build, serve
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            from ..utils.extras import needs

            raise needs("playground", "The playground", "gradio") from error
        from ..playground.session import Session
        from ..playground.setup import Setup

        experts = [*(expert or []), *([library] if library else [])]
        setup = Setup(model_name_or_path or "", "\n".join(experts), dispatch, "\n".join(about or []), classifier or "")
        session = Session(dtype=dtype, base_check=base_check)
        if model_name_or_path:
            for line in session.load(setup):
                print(line)
        page = build(session, setup, system_prompt=system_prompt or "", max_new_tokens=max_new_tokens)
        serve(page, port, _tell)


def _tell(address: Any) -> None:
    print(f"The playground is at {address} (on this machine only). Press Ctrl-C to end it.", flush=True)
