"""The parts of the page that are text and pictures, as HTML. Everything from a model or a user is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from typing import Any

from ..search.progress import SearchProgress
from .session import Searched, Turn
from .setup import AUTO

CSS = """
/* gradio's table and info styles are for other uses: hence `!important`, and a darker info text */
body:not(.dark) .gradio-container {--block-info-text-color: var(--neutral-500)}
.gradio-container {width: 100% !important; max-width: 72rem !important; margin: 0 auto !important}
#chat-message:not(:has(.svf-note)) {display: none !important}
.svf-note {white-space: pre-wrap; overflow-wrap: anywhere; padding: .5rem .75rem; border-radius: .5rem;
    border: 1px solid var(--border-color-primary)}
.svf-note.error {border-color: var(--error-border-color); background: var(--error-background-fill);
    color: var(--error-text-color)}
.svf-turn + .svf-turn {margin-top: 1.25rem}
.svf-question {font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .5rem}
.svf-answers {display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 12rem), 1fr))}
.svf-answer {border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .6rem .75rem; min-width: 0;
    background: var(--background-fill-secondary)}
.svf-answer h4 {margin: 0 0 .35rem; font-size: .9rem; overflow-wrap: anywhere}
.svf-answer h4 small {font-weight: 400; opacity: .8}
.svf-text {white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45}
.svf-turn[aria-busy=true] .svf-text::after {content: "▍"; opacity: .5}
.svf-failed {color: var(--error-text-color)}
.svf-bars {display: grid; grid-template-columns: minmax(4rem, max-content) 1fr 3rem; gap: .2rem .5rem;
    align-items: center; font-size: .8rem; margin: .6rem 0 0}
.svf-bars > span {overflow-wrap: anywhere}
.svf-bar {height: .6rem; border-radius: .3rem; background: var(--border-color-primary); overflow: hidden}
.svf-bar > i {display: block; height: 100%; background: var(--color-accent)}
.svf-scores {border-collapse: collapse; width: 100%; font-size: .9rem; margin: .75rem 0 !important}
.svf-scores, .svf-scores tr {border-width: 0 !important}
.svf-scores td, .svf-scores th {text-align: left; padding: .3rem .5rem .3rem 0 !important; overflow-wrap: break-word;
    border-width: 0 0 1px !important; border-color: var(--border-color-primary) !important}
.svf-scores .kept {font-weight: 600}
.svf-plot {overflow-x: auto; margin-top: .75rem}
.svf-plot img {display: block; min-width: 42rem; width: 100%; max-width: 70rem; background: white}
.svf-empty {opacity: .8; padding: 1.5rem 0; text-align: center}
"""


def message(error: object) -> str:
    """Return an error in a box."""
    return f'<div class="svf-note error" role="alert">{escape(str(error))}</div>'


def note(text: str) -> str:
    """Return a line in a box."""
    return f'<div class="svf-note" role="status">{escape(text)}</div>'


def conversation(turns: Sequence[Turn]) -> str:
    """Return all questions with their answers side by side."""
    if not turns:
        return '<div class="svf-empty">Ask a question. Every answer that you choose below gets a column.</div>'
    return "".join(map(_turn, turns))


def _turn(turn: Turn) -> str:
    answers = "".join(_answer(turn, column) for column in turn.answers)
    question = f'<p class="svf-question">{escape(turn.question)}</p>'
    busy = str(not turn.done).lower()
    return f'<section class="svf-turn" aria-busy="{busy}">{question}<div class="svf-answers">{answers}</div></section>'


def _answer(turn: Turn, column: str) -> str:
    about, below = "", ""
    if column == AUTO:
        about = f" chose {turn.chosen}"
        below = bars(turn.probabilities)
    elif column == "mixture":
        about = " " + ", ".join(f"{name} {weight:.2f}" for name, weight in turn.weights.items())
    failed = turn.errors.get(column)
    text = f'<div class="svf-text">{escape(turn.answers[column])}</div>'
    if failed is not None:
        text = f'<div class="svf-text svf-failed">Not answered: {escape(failed)}</div>'
    title = f"<h4>{escape(column)}<small>{escape(about)}</small></h4>"
    return f'<article class="svf-answer" data-column="{escape(column)}">{title}{text}{below}</article>'


def bars(probabilities: Mapping[str, float]) -> str:
    """Return a bar for each probability."""
    rows = "".join(
        f"<span>{escape(name)}</span>"
        f'<span class="svf-bar"><i style="width: {100 * value:.1f}%"></i></span><span>{value:.2f}</span>'
        for name, value in probabilities.items()
    )
    return f'<div class="svf-bars" aria-label="routing probabilities">{rows}</div>'


def progress(found: SearchProgress) -> str:
    """Return how far a search is, with the scores of its generations."""
    fraction = min(1.0, found.done / found.total) if found.total else 0.0
    of = f" of at most {found.total}" if found.total else ""
    line = f"{found.done} evaluations{of}"
    if found.history:
        last = found.history[-1]
        again = sum(entry["generation"] == 0 for entry in found.history) - 1
        line += f", cross-validation {again}" if again else ""
        line += f", generation {last['generation'] + 1}: best {last['best']:.3f}, mean {last['mean']:.3f}"
    bar = f'<div class="svf-bar"><i style="width: {100 * fraction:.1f}%"></i></div>'
    return f'<div role="status"><p>{escape(line)}</p>{bar}</div>'


def searched(found: Searched, picture: bytes | None) -> str:
    """Return the scores of a search, what they mean, and its plot."""
    result = found.result
    if found.name is None:
        line = (
            "Nothing is kept, because no mixture is better than another. Compare the answers in the chat with the "
            "reward: it must accept their form. Or use easier examples."
        )
    else:
        stopped = "The search was stopped. " if result.stopped == "interrupted" else ""
        line = f"{stopped}The result answers in the chat as {found.name}."
    rows = "".join(
        f'<tr class="{"kept" if name == result.choice else ""}"><td>{escape(name)}</td><td>{score:.3f}</td>'
        f"<td>{result.intervals[name][0]:.3f} to {result.intervals[name][1]:.3f}</td></tr>"
        for name, score in result.scores.items()
    )
    head = f"<tr><th>weights</th><th>{escape(result.objective)}</th><th>95 % interval</th></tr>"
    table = f'<table class="svf-scores">{head}{rows}</table>'
    text = f'<div class="svf-text">{escape(str(result))}</div>'
    return note(line) + table + text + (image(picture, "plot of the search") if picture else "")


def png(figure: Any) -> bytes:
    """Return a figure as a PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def image(content: bytes, about: str) -> str:
    """Return a PNG, which scrolls in its own box where the page is narrow."""
    data = base64.b64encode(content).decode()
    return f'<div class="svf-plot"><img alt="{escape(about)}" src="data:image/png;base64,{data}"></div>'
