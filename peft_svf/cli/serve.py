"""`peft-svf serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .adapt import adaptive_model
from .errors import in_a_line
from .options import call, chosen_experts, named, takes

_LOCAL = ("localhost", "127.0.0.1", "::1")


@takes(adaptive_model)
def serve(
    model: Annotated[
        Optional[str],
        typer.Argument(help="The base model, in place of --model_name_or_path.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[
        Optional[str],
        typer.Option(
            "--served_model_name",
            help="Name of the base model in requests. Default: its Hub id, or the name of its folder.",
        ),
    ] = None,
    api_key: Annotated[
        Optional[str],
        typer.Option("--api_key", envvar="PEFT_SVF_API_KEY", help="The key that requests must have."),
    ] = None,
    expert_root: Annotated[
        Optional[Path],
        typer.Option(
            "--expert_root",
            help="A folder. Clients may load experts in it, and unload them. Default: they cannot.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    max_mixture: Annotated[
        int, typer.Option("--max_mixture", help="Experts of a mixture, at most.", min=1, max=32)
    ] = 8,
    max_request_bytes: Annotated[int, typer.Option("--max_request_bytes", help="Largest request.", min=1024)] = 2**20,
    cache_tokens: Annotated[
        Optional[int],
        typer.Option(
            "--cache_tokens",
            help="Tokens of all running requests together. More wait. Default: what a GPU holds; 16384 on a CPU.",
            min=64,
        ),
    ] = None,
    **options: Any,
) -> None:
    """Serve experts by the OpenAI API, another one for each request. The model "auto" chooses by the prompt.

    peft-svf serve HuggingFaceTB/SmolLM2-135M-Instruct --expert math=experts/math --expert logic=experts/logic
    """
    with in_a_line():
        given = options["model_name_or_path"]
        if model is not None and given is not None:
            raise ValueError(f"The base model is given twice, as {model!r} and {given!r}.")
        options["model_name_or_path"] = model or given
        chosen = chosen_experts(options["model_name_or_path"], options["expert"], options["library"])
        described = {**dict.fromkeys(chosen.every, ""), **(chosen.library.descriptions if chosen.library else {})}
        described |= named("--description", options["description"], "NAME=TEXT")
        name = served_model_name or _name_of(chosen.base_model)
        Endpoint, Engine, Experts, Server, bound = _parts()
        address = bound(host, port)  # before anything is loaded
        adaptive = call(adaptive_model, options)
        engine = Engine(adaptive.model, adaptive.tokenizer, cache_tokens=cache_tokens)
        try:
            experts = Experts(
                engine,
                described,
                base_name=name,
                max_mixture=max_mixture,
                root=expert_root,
                base_check=options["base_check"],
            )
            endpoint = Endpoint(
                engine,
                experts,
                adaptive.tokenizer,
                adaptive.dispatcher,
                soft=adaptive.soft,
                api_key=api_key,
                max_bytes=max_request_bytes,
            )
        except BaseException:
            engine.stop()
            raise
        if host not in _LOCAL and api_key is None:
            print(f"Warning: everyone who reaches {host} can use this server. Pass --api_key.", file=sys.stderr)

        def on_start() -> None:
            place = f"[{host}]" if ":" in host else host
            served = ", ".join([name, "auto", *described])
            print(f"Serving {served} at http://{place}:{address.getsockname()[1]}/v1", flush=True)

        try:
            Server(endpoint, on_start).run(sockets=[address])
        finally:
            endpoint.close()


def _name_of(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model


def _parts() -> Any:
    from ..utils.extras import needs

    try:
        from ..serving.endpoint.app import Endpoint
        from ..serving.endpoint.engine import Engine
        from ..serving.endpoint.experts import Experts
        from ..serving.endpoint.server import Server, bound
    except ModuleNotFoundError as error:
        raise needs("serve", "`peft-svf serve`", str(error.name)) from error
    return Endpoint, Engine, Experts, Server, bound
