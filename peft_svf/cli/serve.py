"""`peft-svf serve`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .adapt import adaptive_model
from .choices import ENGINES, one_of
from .errors import in_a_line
from .options import call, chosen_experts, named, takes

_LOCAL = ("localhost", "127.0.0.1", "::1")


@takes(adaptive_model)
def serve(
    model: Annotated[
        Optional[str],
        typer.Argument(help="The base model, in place of --model_name_or_path.", show_default=False),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            help='transformers, which also offers "auto"; or vllm, without it, and with vLLM\'s own settings.',
            **one_of(ENGINES),
        ),
    ] = "transformers",
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
        if engine == "vllm":
            command = {"name": name, "host": host, "port": port, "root": expert_root, "api_key": api_key}
            _become_vllm(chosen, options, **command)
        parts = _parts()
        address = parts.bound(host, port)  # before anything is loaded
        adaptive = call(adaptive_model, options)
        running = parts.Engine(adaptive.model, adaptive.tokenizer, cache_tokens=cache_tokens)
        try:
            settings = {"max_mixture": max_mixture, "root": expert_root, "base_check": options["base_check"]}
            experts = parts.Experts(running, described, base_name=name, **settings)
            endpoint = parts.Endpoint(
                running,
                experts,
                adaptive.tokenizer,
                adaptive.dispatcher,
                soft=adaptive.soft,
                api_key=api_key,
                max_bytes=max_request_bytes,
            )
        except BaseException:
            running.stop()
            raise
        if host not in _LOCAL and api_key is None:
            print(f"Warning: everyone who reaches {host} can use this server. Pass --api_key.", file=sys.stderr)

        def on_start() -> None:
            place = f"[{host}]" if ":" in host else host
            served = ", ".join([name, "auto", *described])
            print(f"Serving {served} at http://{place}:{address.getsockname()[1]}/v1", flush=True)

        try:
            parts.Server(endpoint, on_start).run(sockets=[address])
        finally:
            endpoint.close()


def _name_of(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model


def _parts() -> Any:
    """Return what a server consists of."""
    from ..utils.extras import needs

    try:
        from ..serving.endpoint import parts
    except ModuleNotFoundError as error:
        raise needs("serve", "`peft-svf serve`", str(error.name)) from error
    return parts


def _become_vllm(chosen: Any, options: dict[str, Any], **command: Any) -> None:
    """Replace this process by vLLM's server.

    Raises:
        ValueError: An option has no effect there.
        ImportError: vLLM is missing or has another version than those that were tested.
    """
    from ..library import ExpertLibrary
    from ..serving.vllm_server import server_command

    for option in ("dispatch", "classifier", "label", "nearest_examples", "weight", "threshold", "soft"):
        if options[option]:
            raise ValueError(f'--{option} is about "auto", which vLLM does not offer. Use --engine transformers.')
    library = chosen.library or ExpertLibrary()
    if chosen.library is None:
        for name, path in chosen.every.items():
            library.include(name, path)
    words, environment = server_command(
        chosen.base_model,
        library.paths(),
        base_check=options["base_check"],
        dtype=options["dtype"],
        **chosen.options,
        **command,
    )
    os.execve(words[0], words, {**os.environ, **environment})
