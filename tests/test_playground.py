"""The playground: what it does without a page, and the page in a headless browser."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import EXECUTABLE, Chromium
from helpers import base_model, make_tokenizer, save_expert

from peft_svf import SelfAdaptiveModel, SVFConfig, SVFRuntimeConfig
from peft_svf.playground import html, streaming
from peft_svf.playground.jobs import Jobs
from peft_svf.playground.pasted import pasted_examples
from peft_svf.playground.session import Searched, Session, Turn
from peft_svf.playground.setup import Setup, experts_of
from peft_svf.routing.dispatch import fixed_dispatch
from peft_svf.search.progress import SearchProgress

EXAMPLES = "\n".join(f'{{"prompt": "{a} + {a} =", "answer": "{2 * a}"}}' for a in range(1, 5))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and a folder of two experts."""
    folder = tmp_path_factory.mktemp("playground")
    base_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("lists", "sums")):
        save_expert(folder / "experts" / name, SVFConfig(target_modules="all-linear"), seed)
    (folder / "lists.txt").write_text("a cat\nmy dog\n")
    (folder / "sums.txt").write_text("1 + 2\n3 + 4\n")
    return folder


def setup_of(world: Path, **changes: str) -> Setup:
    about = f"lists = {world / 'lists.txt'}\n\nsums = {world / 'sums.txt'}"
    fields = {"model": str(world / "base"), "experts": str(world / "experts"), "dispatch": "nearest", "about": about}
    return Setup(**{**fields, **changes})


def loaded(world: Path) -> Session:
    session = Session(runtime_config=SVFRuntimeConfig(use_cache=False, fold="never"))
    (line,) = session.load(setup_of(world))
    assert "with 2 experts" in line
    assert "NearestDispatcher" in line
    return session


@pytest.fixture(scope="module")
def session(world: Path) -> Session:
    return loaded(world)


# ------------------------------------------------------------------------------------------------------------- loading


def test_experts_come_from_lines_and_folders(world: Path) -> None:
    folder = world / "experts"
    assert experts_of(f" {folder} \n\nmath = some/where\n") == {
        "lists": str(folder / "lists"),
        "sums": str(folder / "sums"),
        "math": "some/where",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": " "}, "There is no base model"),
        ({"model": "no/such-model"}, "no/such-model"),
        ({"experts": "\n"}, "There are no experts"),
        ({"experts": "no/such/folder"}, "'no/such/folder' is no folder of experts"),
        ({"experts": "sums="}, "A line must be NAME=PATH, got 'sums='"),
        ({"experts": "auto=somewhere"}, "cannot be called 'auto'"),
        ({"experts": "a=1\na=2"}, "'a' is given twice, as '1' and '2'"),
        ({"experts": "a=no/such/expert"}, "Expert 'a' cannot be read"),
        ({"about": "sums"}, "A line must be NAME=TEXT, got 'sums'"),
        ({"about": "cats=lists.txt", "dispatch": "prompt"}, "'cats' is none of the experts"),
        ({"about": "sums=no-such.txt"}, "no-such.txt"),
        ({"dispatch": "classifier"}, "A classifier must choose, and there is none"),
    ],
)
def test_what_cannot_be_loaded_leaves_what_was_there(
    changes: dict[str, str], message: str, world: Path, session: Session
) -> None:
    before = session.loaded
    with pytest.raises((ValueError, OSError), match=message):
        list(session.load(setup_of(world, **changes)))
    assert session.loaded is before
    assert session.experts == ["lists", "sums"]


@pytest.mark.parametrize("dispatch", ["prompt", "classifier"])
def test_every_dispatcher_can_be_auto(dispatch: str, world: Path) -> None:
    session = Session(runtime_config=SVFRuntimeConfig(use_cache=False))
    about = "lists=words\nsums=numbers"
    expert = str(world / "experts" / "lists") if dispatch == "classifier" else ""
    (line,) = session.load(setup_of(world, dispatch=dispatch, about=about, classifier=expert))
    assert session.columns == ["base", "lists", "sums", "mixture", "auto"]  # the classifier does not answer
    assert ("'numbers'" in line) == (dispatch == "classifier")
    *_, last = session.ask("1 + 2", ["auto"], {}, max_new_tokens=2)
    assert list(last.probabilities) == ["lists", "sums"] + ["base"] * (dispatch == "prompt")


def test_without_a_model_everything_says_so() -> None:
    session = Session()
    assert session.columns == []
    for call in (
        lambda: session.ask("a", ["base"], {}),
        lambda: session.search(EXAMPLES, "exact"),
        lambda: session.heat_map("base", {}),
    ):
        with pytest.raises(ValueError, match="No model is loaded yet"):
            list(call())  # type: ignore[no-untyped-call]


# ------------------------------------------------------------------------------------------------------------- answers


def alone(session: Session, adapter: str, prompt: Any, tokens: int = 6) -> str:
    """The answer of one adapter without a batch."""
    mixture = session._mixture
    assert mixture is not None
    model = SelfAdaptiveModel(mixture.model, mixture.tokenizer, lambda prompts: fixed_dispatch(adapter, prompts))
    found: str = model.chat([prompt], max_new_tokens=tokens, do_sample=False)[0]
    return found


def test_each_column_is_the_answer_of_its_adapter(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "INTERVAL", 0.0)
    columns = ["base", "sums", "mixture", "auto"]
    *growing, last = session.ask("1 + 2", columns, {"lists": 0.9, "sums": 0.2}, max_new_tokens=6)
    assert list(last.answers) == columns
    assert [turn.done for turn in (*growing, last)] == [False] * len(growing) + [True]
    assert last.chosen in ("lists", "sums", "base")
    assert sum(last.probabilities.values()) == pytest.approx(1)
    assert last.weights == pytest.approx({"lists": 0.9, "sums": 0.2})
    assert last.answers["auto"] == last.answers.get(last.chosen, last.answers["auto"])
    for column in ("base", "sums", "mixture"):
        assert last.answers[column] == alone(session, column, "1 + 2")
        assert all(last.answers[column].startswith(turn.answers[column]) for turn in growing)
    assert len(set(last.answers.values())) >= 3
    (other,) = [*session.ask("1 + 2", ["mixture"], {"lists": 0.0, "sums": 0.0}, max_new_tokens=6)][-1:]
    assert other.answers["mixture"] == last.answers["base"]


def test_a_column_remembers_its_own_answers(session: Session) -> None:
    before = [Turn("1 + 2", {"base": "3", "sums": "4"}), Turn("a cat", {"base": "no"}, {"sums": "it failed"})]
    *_, last = session.ask("2 + 2", ["base", "sums"], {}, before, max_new_tokens=4)
    user, mine = "user", "assistant"
    of_base = [(user, "1 + 2"), (mine, "3"), (user, "a cat"), (mine, "no"), (user, "2 + 2")]
    of_sums = [(user, "1 + 2"), (mine, "4"), (user, "2 + 2")]
    for column, turns in (("base", of_base), ("sums", of_sums)):
        messages = [{"role": role, "content": text} for role, text in turns]
        assert last.answers[column] == alone(session, column, messages, 4)


def test_an_answer_can_be_stopped(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "INTERVAL", 0.0)
    monkeypatch.setattr(session.jobs, "stopped", threading.Event())
    put = streaming.RowStreamer.put

    def stop_at_the_fifth(self: Any, value: Any) -> None:
        put(self, value)
        if self._rows and len(self._rows[0]) == 5:
            session.jobs.stop()

    monkeypatch.setattr(streaming.RowStreamer, "put", stop_at_the_fifth)
    *_, last = session.ask("1 + 2", ["base"], {}, max_new_tokens=90)
    monkeypatch.undo()
    whole = alone(session, "base", "1 + 2", 90)
    assert whole.startswith(last.answers["base"])
    assert len(last.answers["base"]) <= 6


def test_mistakes_in_a_question(session: Session) -> None:
    for arguments, message in (
        (("  ", ["base"], {}), "The question is empty"),
        (("1", [], {}), "Choose at least one"),
        (("1", ["searched-9"], {}), "There is no 'searched-9' any more"),
    ):
        with pytest.raises(ValueError, match=message):
            session.ask(*arguments)
    *_, last = session.ask("12 " * 60, ["base", "sums"], {}, max_new_tokens=4)
    assert "the context has room for" in last.errors["base"]
    assert "Not answered" in html.conversation([last])


def test_jobs_wait_for_each_other_and_pass_errors_on() -> None:
    jobs, order = Jobs(), list[str]()
    goes_on = threading.Event()

    def first(emit: Any) -> None:
        emit("begun")
        goes_on.wait(10)
        order.append("first")
        raise RuntimeError("broken")

    running = jobs.run(first)
    assert next(running) == "begun"
    second = threading.Thread(target=lambda: [*jobs.run(lambda emit: order.append("second"))])
    second.start()
    goes_on.set()
    with pytest.raises(RuntimeError, match="broken"):
        list(running)
    second.join(10)
    assert order == ["first", "second"]


def test_a_job_that_nobody_reads_is_stopped() -> None:
    jobs, ended = Jobs(), threading.Event()

    def job(emit: Any) -> None:
        emit(1)
        assert jobs.stopped.wait(10)
        ended.set()

    reader = jobs.run(job)
    next(reader)
    reader.close()
    assert ended.wait(10)


# ------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "1+1=", "answer": "02"}\n\n{"prompt": "a, b", "answer": "x"}\n',
        '[{"prompt": "1+1=", "answer": "02"}, {"prompt": "a, b", "answer": "x"}]',
        'prompt,answer\n1+1=,02\n"a, b",x\n',
        "prompt\tanswer\n1+1=\t02\na, b\tx\n",
    ],
)
def test_examples_are_pasted_in_four_forms(text: str) -> None:
    rows = pasted_examples(text)
    assert [(row["prompt"], row["answer"]) for row in rows] == [("1+1=", "02"), ("a, b", "x")]
    (turn,) = pasted_examples(text, chat=True)[0]["prompt"]
    assert turn == {"role": "user", "content": "1+1="}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "There are no examples"),
        ('{"prompt": "a"}\n{"prompt": ', "The examples, line 2 is not valid JSON"),
        ("question,answer\n1,2", "row 1 has no 'prompt'; it has 'question', 'answer'. The columns must be called"),
        ("prompt,answer\n1,2,3", "line 2 has 3 fields, its header 2"),
        ("prompt,answer", "a header and no rows"),
        ('["a"]', "row 1 must be a mapping"),
        ('{"prompt": 3}', "row 1 has the 'prompt' 3"),
    ],
)
def test_mistakes_in_examples(text: str, message: str, session: Session) -> None:
    with pytest.raises(ValueError, match=message):
        session.search(text, "exact")


def test_a_search_tells_its_progress_and_becomes_a_column(world: Path) -> None:
    session = loaded(world)
    *steps, last = session.search(EXAMPLES, "loglik")
    assert isinstance(last, Searched)
    assert last.name == "searched-1"
    assert session.columns[-1] == "searched-1"
    done = [step.done for step in steps if isinstance(step, SearchProgress)]
    assert done
    assert done == sorted(done)
    assert steps[-1].total >= steps[-1].done
    assert "evaluations of at most" in html.progress(steps[-1])
    # it stays when the sliders move, and when the next search begins
    found = session.ask("1 + 2", ["searched-1"], {}, max_new_tokens=6)
    answer = [*found][-1].answers["searched-1"]
    (*_, turn) = session.ask("1 + 2", ["searched-1", "mixture"], {"lists": 0.0, "sums": 0.0}, max_new_tokens=6)
    assert turn.answers["searched-1"] == answer == alone(session, "searched-1", "1 + 2")
    assert next(session.heat_map("searched-1", {}))[:4] == b"\x89PNG"
    assert "<table" in html.searched(last, None)

    (*_, equal) = session.search(EXAMPLES, "exact", max_new_tokens=2)
    assert isinstance(equal, Searched)
    assert equal.name is None
    assert "Nothing is kept" in html.searched(equal, None)
    assert session.searched == ["searched-1"]


@pytest.mark.parametrize("at", ["begin", "generation"])
def test_a_search_can_be_stopped(at: str, session: Session) -> None:
    before = list(session.searched)
    steps = session.search(EXAMPLES, "loglik")
    emit: list[Any] = []
    stop = session.jobs.stop
    mixture = session._mixture
    assert mixture is not None
    search = mixture.search

    def watched(*args: Any, on_progress: Any, **kwargs: Any) -> Any:
        def see(progress: SearchProgress) -> None:
            emit.append(progress.done)
            if at == "begin" or progress.history:
                stop()
            on_progress(progress)

        return search(*args, on_progress=see, **kwargs)

    mixture.search = watched  # type: ignore[method-assign]
    try:
        if at == "begin":
            with pytest.raises(ValueError, match="stopped before its first scores"):
                list(steps)
            assert session.searched == before
        else:
            *_, last = steps
            assert isinstance(last, Searched)
            assert last.result.stopped == "interrupted"
            assert last.name in session.searched
            assert "The search was stopped." in html.searched(last, None)
    finally:
        del mixture.search


def test_the_progress_counts_although_bars_are_disabled(session: Session) -> None:
    """The tests disable progress bars, and a disabled bar does not count."""
    mixture = session._mixture
    assert mixture is not None
    seen: list[tuple[int, int | None, int]] = []
    result = mixture.search(
        pasted_examples(EXAMPLES),
        on_progress=lambda p: seen.append((p.done, p.total, len(p.history))),
        method="cem",
        num_generations=2,
        population_size=4,
    )
    assert seen[-1][0] >= result.usage.evaluations > 0
    assert seen[-1][2] >= len(result.history)
    assert all(total is None or done <= total for done, total, _ in seen)


def test_the_heat_map_of_the_mixture_follows_the_sliders(session: Session) -> None:
    (one,) = session.heat_map("mixture", {"lists": 1.0})
    (alone,) = session.heat_map("lists", {})
    (other,) = session.heat_map("mixture", {"sums": 1.0})
    assert one[:4] == alone[:4] == b"\x89PNG"
    assert one != other
    with pytest.raises(ValueError, match="There is no δ of 'auto'"):
        session.heat_map("auto", {})


def test_everything_in_the_html_is_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>"
    turn = Turn(evil, {evil: evil, "auto": evil}, {evil: evil}, {evil: 0.5}, evil, {evil: 1.0})
    for text in (html.conversation([turn]), html.message(evil), html.note(evil), html.bars({evil: 0.5})):
        assert "<img" not in text
        assert "&lt;img" in text


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_loads_and_serves(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    testing = pytest.importorskip("typer.testing")
    from peft_svf.cli.app import app
    from peft_svf.playground import page

    served: list[Any] = []
    monkeypatch.setattr(page, "serve", lambda *arguments: served.append(arguments))
    words = ["playground", "--model_name_or_path", str(world / "base"), "--library", str(world / "experts")]
    result = testing.CliRunner().invoke(app, [*words, "--port", "7999"])
    assert result.exit_code == 0, result.output
    assert "with 2 experts" in result.stdout
    assert served[0][1] == 7999
    for more, message in (
        (["--expert", "sums"], "--expert must be NAME=PATH"),
        (["--library", str(world)], "is no folder of experts"),
        (["--about", "cats=x"], "'cats' is none of the experts"),
    ):
        result = testing.CliRunner().invoke(app, [*words[:3], "--library", str(world / "experts"), *more])
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())
    assert testing.CliRunner().invoke(app, ["playground"]).exit_code == 0  # the page asks for a model
    assert len(served) == 2


def test_without_gradio_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("typer.testing")
    from peft_svf.cli.app import app

    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "peft_svf.playground.page", raising=False)
    result = testing.CliRunner().invoke(app, ["playground"])
    assert result.exit_code == 1
    assert "The playground needs gradio" in result.output
    assert "[playground]" in result.output


# ------------------------------------------------------------------------------------------------------------- browser

WIDTHS = (1280, 390)

# Pairs of visible controls whose boxes overlap, although neither is in the other; and what is cut off.
OVERLAPS = """(() => {
    const seen = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true, contentVisibilityAuto: true})
        && e.getBoundingClientRect().width > 1;
    const every = [...document.querySelectorAll('button, input, textarea, label, article, table, img')].filter(seen);
    const name = e => `${e.tagName} ${e.id || e.closest('[id]')?.id} ${(e.innerText || e.value || '').slice(0, 20)}`;
    const found = [];
    for (const [i, a] of every.entries()) {
        if (!a.matches('input, textarea, img, .label-wrap') && a.scrollWidth > a.clientWidth + 1 && a.clientWidth)
            found.push(`${name(a)} is cut off`);  // but for accordions, whose arrow is rotated
        for (const b of every.slice(i + 1)) {
            if (a.contains(b) || b.contains(a) || (a.control ?? b.control ?? 0) === (a.control ? b : a)) continue;
            if (a.closest('.svf-plot') || b.closest('.svf-plot')) continue;  // it scrolls in its box
            const [r, s] = [a.getBoundingClientRect(), b.getBoundingClientRect()];
            const across = Math.min(r.right, s.right) - Math.max(r.left, s.left);
            const down = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
            if (across > 1 && down > 1) found.push(`${name(a)} and ${name(b)}`);
        }
    }
    const disabled = [...document.querySelectorAll('input:disabled, textarea:disabled')];
    found.push(...disabled.map(e => `${name(e)} is disabled`));
    const page = document.documentElement;
    if (page.scrollWidth > page.clientWidth) found.push(`${page.scrollWidth} px in ${page.clientWidth}`);
    return found;
})()"""


@pytest.fixture(scope="module")
def address(session: Session, world: Path) -> Iterator[str]:
    """The address of the page, served in this process."""
    pytest.importorskip("gradio")
    from peft_svf.playground.page import build, serve

    page = build(session, setup_of(world), max_new_tokens=12)
    found: list[str] = []
    ready = threading.Event()

    def tell(place: str) -> None:
        found.append(place)
        ready.set()

    threading.Thread(target=serve, args=(page, None, tell), daemon=True).start()
    assert ready.wait(60)
    yield found[0]
    page.close(verbose=False)


def test_the_page_is_for_this_machine_only(address: str) -> None:
    import gradio as gr

    from peft_svf.playground.page import serve

    host, port = address.rstrip("/").removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    socket.create_connection((host, int(port)), timeout=5).close()
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for other in others:
        if not other.startswith("127."):
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((other, int(port)), timeout=5)
    with gr.Blocks() as another, pytest.raises(OSError, match=f"Port {port} is taken. Pass another --port"):
        serve(another, int(port))


@pytest.fixture(scope="module")
def browser(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if EXECUTABLE is None:
        pytest.skip("No Chromium or Chrome is installed.")
    with Chromium(tmp_path_factory.mktemp("profile")) as page:
        page.open(address, WIDTHS[0])
        page.wait(by("#columns input:checked"))
        page.wait(by("#weight-1 input"))
        yield page


def by(selector: str) -> str:
    return f"document.querySelector({selector!r})"


def tab(browser: Chromium, name: str) -> None:
    browser.click(
        f"[...document.querySelectorAll('button[role=tab]')].find(e => e.innerText === {name!r} && e.offsetParent)"
    )
    browser.wait(f"document.querySelector('button[role=tab][aria-selected=true]').innerText === {name!r}")
    settle(browser)  # a panel is made when it is shown first


def settle(browser: Chromium) -> None:
    browser.js("new Promise(done => requestAnimationFrame(() => setTimeout(done, 150)))")


def check_layout(browser: Chromium, folder: Path, name: str) -> None:
    """No overlap and no horizontal scrolling, at both widths; pictures go to the folder of the test."""
    for width in WIDTHS:
        browser.resize(width)
        browser.wait(f"innerWidth === {width}")
        settle(browser)
        browser.screenshot(folder / f"{name}-{width}.png")
        assert browser.js(OVERLAPS) == [], (name, width)
        assert browser.js("document.querySelector('.toast-wrap').innerText") == ""  # gradio's own errors
    browser.resize(WIDTHS[0])


def test_the_check_of_the_layout_finds_overlaps(browser: Chromium) -> None:
    for element, style, found in (
        (
            "document.querySelector('#send')",
            "transition: none; transform: translateX(60px)",
            "send Send and BUTTON stop",
        ),
        ("document.querySelector('#send')", "transition: none; min-width: 0; max-width: 9px; padding: 0", "is cut off"),
        ("document.body", "min-width: 2000px", "2000 px in 1280"),
    ):
        before = browser.js(f"{element}.style.cssText")
        browser.js(f"{element}.style.cssText = {style!r}")
        assert found in "\n".join(browser.js(OVERLAPS)), style
        browser.js(f"{element}.style.cssText = {before!r}")
        settle(browser)
    assert browser.js(OVERLAPS) == []


def test_questions_in_the_browser(browser: Chromium, session: Session, tmp_path: Path) -> None:
    browser.click(by("#send"))
    browser.wait("document.querySelector('#chat-message')?.innerText.includes('The question is empty')")
    browser.type(by("#question textarea"), "1 + 2")
    browser.press_enter()
    browser.wait(
        "document.querySelectorAll('.svf-answer').length === 3 && document.querySelectorAll('.svf-bar').length"
    )
    browser.wait(f"!{by('#chat-message .error')}")
    assert browser.js("[...document.querySelectorAll('.svf-answer')].map(e => e.dataset.column)") == [
        "base",
        "mixture",
        "auto",
    ]
    browser.wait("document.querySelector('#question textarea').value === ''")
    expected = alone(session, "base", "1 + 2", 12)
    browser.wait(f"document.querySelector('[data-column=base] .svf-text').textContent === {expected!r}")
    browser.click("[...document.querySelectorAll('button')].find(e => e.innerText.startsWith('Settings'))")
    browser.wait("document.querySelector('#together')?.offsetParent")
    check_layout(browser, tmp_path, "chat")

    # a slider that was just moved counts, an expert can be chosen, and the conversation can be left out
    browser.click(by("#together input"))
    browser.type(by("#weight-0 input[type=number]"), "0")
    browser.type(by("#weight-1 input[type=number]"), "0.25")
    browser.click("[...document.querySelectorAll('#columns label')].find(e => e.innerText.trim() === 'lists')")
    browser.type(by("#question textarea"), "a cat")
    browser.click(by("#send"))
    browser.wait("document.querySelectorAll('.svf-turn').length === 2")
    browser.wait("document.querySelectorAll('.svf-turn:last-child .svf-answer').length === 4")
    browser.wait("document.querySelector('.svf-turn:last-child').innerText.includes('lists 0.00, sums 0.25')")
    expected = alone(session, "lists", "a cat", 12)
    last = "document.querySelector('.svf-turn:last-child [data-column=lists] .svf-text').textContent"
    browser.wait(f"{last} === {expected!r}")
    browser.click(by("#together input"))
    session.jobs.stopped.clear()
    browser.click(by("#stop"))
    assert session.jobs.stopped.wait(10)
    browser.click(by("#clear"))
    browser.wait("document.querySelectorAll('.svf-turn').length === 0")
    assert browser.problems == []


def test_a_search_in_the_browser(browser: Chromium, session: Session, tmp_path: Path) -> None:
    tab(browser, "Search")
    browser.type(by("#examples textarea"), '{"prompt": ')
    browser.click(by("#search"))
    browser.wait("document.querySelector('#found').innerText.includes('The examples, line 1 is not valid JSON')")
    browser.click(by("#reward input"))
    browser.click("[...document.querySelectorAll('[role=option]')].find(e => e.innerText.trim() === 'loglik')")
    browser.type(by("#examples textarea"), EXAMPLES)
    check_layout(browser, tmp_path, "search-before")
    browser.click(by("#search"))
    browser.wait(by(".svf-scores"), 60)
    name = session.searched[-1]
    assert f"answers in the chat as {name}" in browser.js("document.querySelector('#found').innerText")
    check_layout(browser, tmp_path, "search")

    tab(browser, "Chat")
    browser.wait(f"document.querySelector('#columns').innerText.includes({name!r})")
    browser.type(by("#question textarea"), "3 + 4")
    browser.click(by("#send"))
    browser.wait(by(f"[data-column={name}]"))
    assert browser.problems == []


def test_the_heat_map_in_the_browser(browser: Chromium, tmp_path: Path) -> None:
    tab(browser, "δ")
    browser.wait(by(".svf-plot img[alt*=lists]"))  # the first one
    browser.click(by("#delta-of input"))
    browser.click("[...document.querySelectorAll('[role=option]')].find(e => e.innerText.trim() === 'sums')")
    browser.wait(by(".svf-plot img[alt*=sums]"))
    browser.wait("document.querySelector('.svf-plot img[alt*=sums]').naturalWidth > 300")
    check_layout(browser, tmp_path, "delta")


def test_a_wrong_model_in_the_browser(browser: Chromium, world: Path, address: str, tmp_path: Path) -> None:
    tab(browser, "Model")
    browser.type(by("#base textarea, #base input"), "no/such-model")
    browser.click(by("#load"))
    browser.wait("document.querySelector('#status').innerText.includes('no/such-model')")
    browser.wait(by("#status .error"))
    assert "Traceback" not in browser.js("document.body.innerText")
    check_layout(browser, tmp_path, "model")
    browser.type(by("#base textarea, #base input"), str(world / "base"))
    browser.click(by("#load"))
    browser.wait("document.querySelector('#status').innerText.includes('with 2 experts')")
    tab(browser, "Chat")  # all works with the model that was loaded last
    browser.wait("document.querySelectorAll('.svf-turn').length === 0")
    browser.type(by("#weight-1 input[type=number]"), "1")
    settle(browser)
    browser.type(by("#question textarea"), "1 + 2")
    browser.click(by("#send"))
    browser.wait("document.querySelector('.svf-turn')?.ariaBusy === 'false'")
    assert "lists 0.50, sums 1.00" in browser.js("document.querySelector('.svf-turn').innerText")
    check_layout(browser, tmp_path, "again")
    outside = [url for url in browser.requested if not url.startswith((address, "data:", "about:", "blob:"))]
    assert outside == []  # no fonts, scripts or statistics of other servers
    assert browser.problems == []
    assert np.all([url.startswith("http://127.0.0.1") for url in browser.requested if url.startswith("http")])
