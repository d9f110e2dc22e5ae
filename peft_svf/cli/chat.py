"""The conversation of `peft-svf chat`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from rich.console import Console

HELP = """\
/expert        show the experts
/expert NAME   let one expert answer from now on; `base` is the base model, `auto` chooses for each message
/clear         start a new conversation
/help          show this list
/quit          end the chat; so do /exit, an empty line and Ctrl-D
The line below an answer names its expert, the probability of that choice, and the seconds of both passes: choosing the
expert, and answering."""


def converse(adaptive: Any, options: Mapping[str, Any]) -> None:
    """
    Talk to a [`SelfAdaptiveModel`] until the user ends the conversation.

    Args:
        adaptive ([`SelfAdaptiveModel`]): The model.
        options (`dict`): Arguments of its `chat`.
    """
    from transformers import TextStreamer

    console, speaker = Console(), adaptive
    messages: list[dict[str, str]] = []
    console.print("[dim]/help lists the commands.[/]")
    while True:
        try:
            text = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            break
        command, _, name = text.partition(" ")
        if command in ("", "/quit", "/exit"):
            break
        if command == "/clear":
            messages = []
            console.print("[dim]A new conversation.[/]")
        elif command == "/expert":
            speaker = _chosen(adaptive, name.strip(), console) or speaker
        elif command.startswith("/"):
            unknown = "" if command == "/help" else f"There is no command {command}.\n"
            console.print(unknown + HELP, highlight=False, markup=False)
        else:
            messages.append({"role": "user", "content": text})
            streamer = TextStreamer(adaptive.tokenizer, skip_prompt=True, skip_special_tokens=True)
            try:
                found = speaker.chat(messages, streamer=streamer, **options)
            except KeyboardInterrupt:
                console.print("\n[dim]Stopped. The message is left out of the conversation.[/]")
                messages.pop()
                continue
            if found.texts[0] is None:
                console.print(f"Not answered: {found.errors[0]}", highlight=False, markup=False)
                messages.pop()
            else:
                console.print(_about(found), style="dim", highlight=False, markup=False)
                messages.append({"role": "assistant", "content": found.texts[0]})


def _chosen(adaptive: Any, name: str, console: Console) -> Any | None:
    """Return the model that answers with one expert, or that chooses; `None` if there is no such expert."""
    from ..routing.dispatch import fixed_dispatch
    from ..routing.self_adaptive import SelfAdaptiveModel
    from ..scoring.names import BASE

    names = [*adaptive.dispatcher([]).experts, BASE]
    if name == "auto":
        console.print("[dim]An expert is chosen for each message.[/]")
        return adaptive
    if name not in names:
        wrong = f"There is no expert {name!r}. " if name else ""
        console.print(f"{wrong}The experts are {', '.join(names)}, or auto.", highlight=False, markup=False)
        return None
    console.print(f"{name} answers from now on.", style="dim", highlight=False, markup=False)
    return SelfAdaptiveModel(adaptive.model, adaptive.tokenizer, functools.partial(fixed_dispatch, name))


def _about(found: Any) -> str:
    """Describe the expert of an answer and the seconds of both passes."""
    expert, labels = found.experts[0], found.dispatch.labels
    seconds = found.seconds
    sure = f", probability {found.dispatch.probabilities[0][labels.index(expert)]:.2f}" if expert in labels else ""
    return f"({expert}{sure}; {seconds['first']:.1f} s to choose, {seconds['second']:.1f} s to answer)"
