"""The page in Gradio: which control calls what. What the calls do is in `session.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from ..scoring.names import BASE
from ..scoring.rewards import REWARDS
from ..utils.errors import EXPECTED
from . import html
from .session import LOGLIK, MIXTURE, Searched, Session, Turn
from .setup import AUTO, CHOOSERS, Setup

EXAMPLES = '{"prompt": "3 + 4 =", "answer": "7"}\n{"prompt": "9 - 2 =", "answer": "7"}'
_ABOUT = (
    "NAME=TEXT on each line. For prompt: what an expert is for. For nearest: a file of example prompts. "
    "For classifier: its label."
)
# Events that use the model wait for each other here, so that none blocks a thread of the server.
_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
_HIDDEN: dict[str, Any] = {"show_progress": "hidden"}


def build(session: Session, setup: Setup, *, system_prompt: str = "", max_new_tokens: int = 256) -> gr.Blocks:
    """
    Return the page.

    Args:
        session ([`Session`]): The model, which may be loaded already.
        setup ([`Setup`]): What the fields of the model hold at first.
        system_prompt (`str`): What its field holds at first.
        max_new_tokens (`int`): What its field holds at first.
    """
    with gr.Blocks(title="peft-svf playground", analytics_enabled=False) as page:
        gr.Markdown("# peft-svf playground")
        turns, experts, weights = gr.State([]), gr.State((0, [])), gr.State({})
        with gr.Tabs(selected="chat" if session.experts else "model"):
            with gr.Tab("Chat", id="chat"):
                said = gr.HTML(html.conversation([]), elem_id="conversation")
                told = gr.HTML(elem_id="chat-message")
                question = gr.Textbox(label="Question", placeholder="What is 3 + 4?", lines=1, elem_id="question")
                with gr.Row():
                    send = gr.Button("Send", variant="primary", min_width=80, elem_id="send")
                    stop = gr.Button("Stop", min_width=80, elem_id="stop")
                    clear = gr.Button("Clear", min_width=80, elem_id="clear")
                columns = gr.CheckboxGroup(label="Answers of", elem_id="columns")
                sliders_here = gr.Column()
                with gr.Accordion("Settings", open=False):
                    system = gr.Textbox(system_prompt, label="System prompt", elem_id="system")
                    tokens = gr.Slider(1, 1024, max_new_tokens, step=1, label="Longest answer in tokens")
                    together = gr.Checkbox(True, label="Answers see the conversation before", elem_id="together")
            with gr.Tab("Search", id="search"):
                pasted = gr.Textbox(
                    label="Examples",
                    info="JSON Lines, or a table with the columns prompt and answer.",
                    placeholder=EXAMPLES,
                    lines=6,
                    max_lines=16,
                    elem_id="examples",
                )
                with gr.Row():
                    reward = gr.Dropdown(
                        [*REWARDS, LOGLIK], value="exact", label="Reward", min_width=200, elem_id="reward"
                    )
                    short = gr.Slider(1, 512, 64, step=1, label="Longest answer in tokens", min_width=200)
                with gr.Row():
                    start = gr.Button("Search", variant="primary", min_width=80, elem_id="search")
                    halt = gr.Button("Stop", min_width=80, elem_id="halt")
                found = gr.HTML(elem_id="found")
            with gr.Tab("δ", id="delta") as delta:
                shown = gr.Dropdown([], label="δ of", elem_id="delta-of")
                picture = gr.HTML(elem_id="delta")
            with gr.Tab("Model", id="model"):
                model = gr.Textbox(setup.model, label="Base model", info="Hub id or folder.", elem_id="base")
                library = gr.Textbox(
                    setup.experts,
                    label="Experts",
                    info="NAME=PATH on each line, or a folder of experts.",
                    lines=3,
                    elem_id="experts",
                )
                chooser = gr.Dropdown([*CHOOSERS], value=setup.dispatch, label="auto chooses by", elem_id="chooser")
                about = gr.Textbox(setup.about, label="About the experts", info=_ABOUT, lines=3, elem_id="about")
                classifier = gr.Textbox(
                    setup.classifier, label="Classification expert", info="For classifier only.", elem_id="classifier"
                )
                load = gr.Button("Load", variant="primary", elem_id="load")
                status = gr.HTML(elem_id="status")

        known = [experts, weights, columns, shown]

        def offered() -> list[Any]:
            """What can be chosen now; what was chosen may be gone."""
            values = session.columns
            chosen = [name for name in (BASE, MIXTURE, AUTO) if name in values]
            drawn = [name for name in values if name not in (BASE, AUTO)]
            return [
                (session.loads, session.experts),  # the number, so that the sliders are made again
                uniform(session.experts),
                gr.CheckboxGroup(choices=values, value=chosen),
                gr.Dropdown(choices=drawn, value=drawn[0] if drawn else None),
            ]

        def loaded(*fields: str) -> Iterator[list[Any]]:
            yield [html.note(f"Loading {fields[0]} ..."), *([gr.skip()] * 5)]
            try:
                for line in session.load(Setup(*fields)):
                    yield [html.note(line), *offered(), []]
            except EXPECTED as error:
                yield [html.message(error), *([gr.skip()] * 5)]

        def ask(
            text: str,
            before: list[Turn],
            chosen: list[str],
            mixed: dict[str, float],
            prompt: str,
            length: float,
            all_before: bool,
        ) -> Iterator[dict[Any, Any]]:
            cleared = {told: "", question: ""}
            answers = [column for column in session.columns if column in chosen]
            seen = before if all_before else []
            try:
                for turn in session.ask(text, answers, mixed, seen, system_prompt=prompt, max_new_tokens=int(length)):
                    after = [*before, turn]
                    yield {turns: after, said: html.conversation(after)} | cleared
                    cleared = {}  # from now on, what is in the field is the next question
            except EXPECTED as error:
                yield {turns: before, said: html.conversation(before), told: html.message(error)}

        def draw(column: str | None, mixed: dict[str, float]) -> str:
            if column is None:
                return ""
            try:
                (content,) = session.heat_map(column, mixed)
            except EXPECTED as error:
                return html.message(error)
            return html.image(content, f"size of δ of {column} by layer and module")

        def search(text: str, name: str, length: float, prompt: str) -> Iterator[list[Any]]:
            yield [html.note("Searching ..."), gr.skip(), gr.skip()]
            try:
                for step in session.search(text, name, system_prompt=prompt, max_new_tokens=int(length)):
                    if isinstance(step, Searched):
                        values = session.columns
                        drawn = [each for each in values if each not in (BASE, AUTO)]
                        chosen = [BASE, step.name] if step.name else None
                        answers = gr.CheckboxGroup(choices=values, value=chosen) if chosen else gr.skip()
                        yield [html.searched(step, _plot(step)), answers, gr.Dropdown(choices=drawn)]
                    else:
                        yield [html.progress(step), gr.skip(), gr.skip()]
            except EXPECTED as error:
                yield [html.message(error), gr.skip(), gr.skip()]

        with sliders_here:

            @gr.render(inputs=experts, **_HIDDEN)
            def sliders(known_experts: tuple[int, list[str]]) -> None:
                """Make a slider for each expert. The sliders write a state: an event of another control, if made here,
                would be sent once more after each load, and fail."""
                _, names = known_experts
                with gr.Accordion("Weights of the mixture", visible=bool(names)), gr.Row():
                    made = [
                        gr.Slider(
                            0, 1, weight, step=0.01, label=name, interactive=True, min_width=200, elem_id=f"weight-{i}"
                        )
                        for i, (name, weight) in enumerate(uniform(names).items())
                    ]
                if made:
                    moved = [slider.change for slider in made]
                    gr.on(moved, lambda *values: dict(zip(names, values, strict=True)), made, weights, queue=False)

        page.load(offered, None, known, **_HIDDEN)
        load.click(loaded, [model, library, chooser, about, classifier], [status, *known, turns], **_QUEUE).success(
            html.conversation, turns, said, show_progress="hidden"
        )
        asking = gr.on(
            [send.click, question.submit],
            ask,
            [question, turns, columns, weights, system, tokens, together],
            [turns, said, told, question],
            **_QUEUE,
        )
        stop.click(session.jobs.stop, queue=False)
        clear.click(lambda: ([], html.conversation([]), ""), None, [turns, said, told], cancels=asking, **_HIDDEN)
        gr.on([shown.change, delta.select], draw, [shown, weights], picture, **_QUEUE)
        start.click(search, [pasted, reward, short, system], [found, columns, shown], **_QUEUE)
        halt.click(session.jobs.stop, queue=False)
    return page


def uniform(names: list[str]) -> dict[str, float]:
    """Return equal weights, as the sliders show them."""
    return {name: round(1 / len(names), 2) for name in names}


def _plot(found: Searched) -> bytes | None:
    try:
        return html.png(found.result.plot())
    except ImportError:  # without matplotlib the table says the same
        return None


def serve(page: gr.Blocks, port: int | None = None, ready: Callable[[str], None] = print) -> None:
    """
    Serve the page on this machine only, until Ctrl-C.

    Args:
        page: The page.
        port (`int`, *optional*): The port. Default: the first free one from 7860.
        ready: Called with the address.

    Raises:
        OSError: The port is taken.
    """
    page.queue()
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=html.CSS,
        )
    except OSError as error:  # its message names a variable and a parameter that our user does not have
        where = "No port from 7860 to 7959 is free" if port is None else f"Port {port} is taken"
        raise OSError(f"{where}. Pass another --port.") from error
    ready(address)
    page.block_thread()
