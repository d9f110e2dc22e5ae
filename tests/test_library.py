"""`ExpertLibrary`, `library.json`, `peft-svf library`, and `--library` of the other commands."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import base_model, logits, make_tokenizer, save_expert
from peft import LoraConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import load_file, save_file

from peft_svf import (
    AdaptiveMixture,
    ExpertLibrary,
    NearestDispatcher,
    PromptDispatcher,
    SelfAdaptiveModel,
    SVFConfig,
    load_experts,
)
from peft_svf.cli.library import METHODS
from peft_svf.library import Source
from peft_svf.library.format import SETTINGS
from peft_svf.playground.setup import experts_of
from peft_svf.reporting.cards import question_of_card, training_card
from peft_svf.scoring.names import CLASSIFIER

testing = pytest.importorskip("typer.testing")
EXAMPLES = {"sums": ["1 + 2", "3 + 4"], "lists": ["a cat", [{"role": "user", "content": "my dog"}]]}
RECORD = {"accuracy_before": 0.25, "accuracy_after": 0.75, "measures": {"loss": [2.0, 0.5]}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two base models, and experts: two for the first, a shorter one, one for other modules, one for the second."""
    folder = tmp_path_factory.mktemp("world")
    base_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    every = SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    for seed, name in enumerate(("sums", "lists", "classifier")):
        save_expert(folder / name, every, seed)
    save_expert(folder / "short", SVFConfig(target_modules="all-linear", r=4), 4)
    save_expert(folder / "attention", SVFConfig(target_modules=["q_proj"]), 5)
    save_expert(folder / "mlp", SVFConfig(target_modules=["up_proj"]), 6)
    save_expert(folder / "other", every, 0, base=base_model(1))
    for name in ("sums", "lists", "classifier", "short", "attention", "mlp", "other"):
        change(folder / name / "adapter_config.json", base_model_name_or_path=str(folder / "base"))
    (folder / "sums" / "training.json").write_text(json.dumps(RECORD))
    (folder / "sums" / "README.md").write_text("# sums\n\n> say\n> 2 + 2\n>\n> **4**\n\nGreedy accuracy.\n")
    get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "lora")
    return folder


def change(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file; a name with `__` is a path to one, and `None` removes it."""
    content = json.loads(file.read_text())
    for name, value in fields.items():
        *way, last = name.split("__")
        place = content
        for step in way:
            place = place[step]
        if value is None:
            del place[last]
        else:
            place[last] = value
    file.write_text(json.dumps(content))


@pytest.fixture
def library(world: Path, tmp_path: Path) -> Path:
    """A library of two experts in a separate folder."""
    with ExpertLibrary.edit(tmp_path / "library") as edited:
        for name in ("sums", "lists"):
            edited.add(name, world / name, description=f"about {name}", examples=EXAMPLES[name])
    return tmp_path / "library"


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of each file of the adapters in a library."""
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.glob("*/*")
        if path.is_file()
    }


def run(*words: Any) -> Any:
    from peft_svf.cli.app import app

    return testing.CliRunner().invoke(app, [str(word) for word in words])


# ------------------------------------------------------------------------------------------------ the library


def test_a_library_holds_copies_and_what_the_folders_say(world: Path, tmp_path: Path) -> None:
    library = ExpertLibrary()
    library.add("sums", world / "sums")
    assert not (tmp_path / "new").exists()
    library.save_pretrained(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new" / "sums").iterdir()} == {
        *("adapter_config.json", WEIGHTS, "README.md", "training.json")
    }
    (tmp_path / "new").rename(tmp_path / "moved")
    found = ExpertLibrary.from_pretrained(tmp_path / "moved")
    assert found.base_model == str(world / "base")
    assert list(found) == ["sums"]
    assert found["sums"].examples == ["say\n2 + 2"]
    scores = {"accuracy": 0.75, "accuracy_before": 0.25, "loss": 0.5, "loss_before": 2.0}
    assert found["sums"].scores == scores
    assert found.paths() == {"sums": str(tmp_path / "moved" / "sums")}
    assert found.check() == {}
    assert "sums" in repr(found)
    assert "prompt" in repr(found)
    assert "fingerprint" not in (tmp_path / "moved" / "library.json").read_text()


def test_adding_touches_no_file_of_the_others_and_keeps_their_answers(world: Path, library: Path) -> None:
    before = contents(library)

    def answers() -> torch.Tensor:
        model = AdaptiveMixture.from_pretrained(base_model(), ExpertLibrary.from_pretrained(library)).model
        model.set_adapter("sums")
        return logits(model)

    first = answers()
    for name in ("short", "attention"):
        with ExpertLibrary.edit(library) as edited:
            edited.add(name, world / name)
    after = contents(library)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    with pytest.warns(UserWarning, match="do not adapt the same"):
        assert torch.equal(answers(), first)


def test_a_folder_of_two_experts_is_not_replaced(world: Path, library: Path) -> None:
    with ExpertLibrary.edit(library) as edited:
        edited.add("again", library / "sums")
    before = contents(library)
    with pytest.raises(ValueError, match=r"sums exists already"), ExpertLibrary.edit(library) as edited:
        edited.add("sums", world / "classifier", overwrite=True)
    assert contents(library) == before
    with ExpertLibrary.edit(library) as edited:
        edited.remove("again")
        edited.add("sums", world / "classifier", overwrite=True)
    assert (library / "sums" / WEIGHTS).read_bytes() == (world / "classifier" / WEIGHTS).read_bytes()


def test_an_expert_is_replaced_and_removed(world: Path, library: Path) -> None:
    with pytest.raises(ValueError, match="already"), ExpertLibrary.edit(library) as edited:
        edited.add("sums", world / "lists")
    with ExpertLibrary.edit(library) as edited:
        edited.add("sums", world / "classifier", overwrite=True)
    found = ExpertLibrary.from_pretrained(library)
    assert (library / "sums" / WEIGHTS).read_bytes() == (world / "classifier" / WEIGHTS).read_bytes()
    assert found.descriptions["sums"] == "about sums"
    assert found.examples["sums"] == EXAMPLES["sums"]
    assert found["sums"].scores == {}  # of the adapter that was there before
    with ExpertLibrary.edit(library) as edited:
        edited.set_dispatch("prompt", labels={"sums": "math", "lists": "words"}, threshold=0.5)
        edited.remove("sums")
    found = ExpertLibrary.from_pretrained(library)
    assert list(found) == ["lists"]
    assert (library / "sums" / WEIGHTS).exists()
    assert found.dispatch.settings == {"labels": {"lists": "words"}, "threshold": 0.5}
    with pytest.raises(ValueError, match=r"sums exists already"), ExpertLibrary.edit(library) as edited:
        edited.add("sums", world / "sums")
    with ExpertLibrary.edit(library) as edited:  # the folder that is there
        edited.add("sums", library / "sums")
    assert ExpertLibrary.from_pretrained(library).paths()["sums"] == str(library / "sums")
    with pytest.raises(ValueError, match="no expert 'nothing'"):
        found.remove("nothing")


def test_a_linked_folder_stays_where_it_is(world: Path, library: Path) -> None:
    with ExpertLibrary.edit(library) as edited:
        edited.add("short", os.path.relpath(world / "short"), link=True)
    assert json.loads((library / "library.json").read_text())["experts"]["short"]["path"] == str(world / "short")
    assert not (library / "short").exists()
    with ExpertLibrary.edit(library) as edited:
        edited.add("attention", world / "attention")
    assert ExpertLibrary.from_pretrained(library).paths()["short"] == str(world / "short")


@pytest.mark.parametrize(
    ("name", "place", "said"),
    [
        ("other", "other", "another base model than 'sums'.*σ"),
        ("lora", "lora", "LORA adapter"),
        ("base", "lists", "the name of the base model"),
        (CLASSIFIER, "lists", "the adapter that classifies"),
        ("auto", "lists", "a choice for each prompt"),
        ("a.b", "lists", "dots"),
        ("../b", "lists", "slashes"),
        ("new", "nowhere", "no folder"),
        ("new", "base", "adapter_config.json|config"),
    ],
)
def test_what_is_no_expert_of_the_library_is_refused(
    name: str, place: str, said: str, world: Path, library: Path
) -> None:
    before = (library / "library.json").read_text()
    with pytest.raises((ValueError, OSError), match=said), ExpertLibrary.edit(library) as edited:
        edited.add(name, world / place)
    assert (library / "library.json").read_text() == before
    assert {path.name for path in library.iterdir() if path.is_dir()} == {"sums", "lists"}


def test_the_base_model_is_known_by_its_weights_and_not_by_its_name(world: Path, library: Path, tmp_path: Path) -> None:
    named = shutil.copytree(world / "short", tmp_path / "named")  # other r, so other samples of the vectors
    change(named / "adapter_config.json", base_model_name_or_path="me/the-same-model")
    with ExpertLibrary.edit(library) as edited:
        edited.add("named", named)
    without = shutil.copytree(named, tmp_path / "without")
    change(without / "adapter_config.json", base_fingerprint={})
    with pytest.raises(ValueError, match="'me/the-same-model'"), ExpertLibrary.edit(library) as edited:
        edited.add("without", without)
    alone = ExpertLibrary()  # different weights of one model cannot be compared
    alone.add("attention", world / "attention")
    alone.add("mlp", world / "mlp")
    alone.add("sums", world / "sums")


def test_check_names_each_problem(world: Path, library: Path) -> None:
    with ExpertLibrary.edit(library) as edited:
        for name in ("short", "attention"):
            edited.add(name, world / name)
        edited.set_dispatch("nearest")
    shutil.copytree(world / "other", library / "other")
    change(library / "library.json", experts__other={"path": "other", "examples": ["x"]})
    shutil.rmtree(library / "lists")
    tensors = load_file(library / "short" / WEIGHTS)
    first = sorted(tensors)[0]
    tensors[first][0] = float("nan")
    save_file(tensors, library / "short" / WEIGHTS)
    problems = ExpertLibrary.from_pretrained(library).check()
    assert set(problems) == {"lists", "short", "attention", "other"}
    assert "no folder" in problems["lists"]
    assert "NaN" in problems["short"]
    assert "example prompts" in problems["attention"]
    assert "another base model" in problems["other"]
    (library / "attention" / WEIGHTS).write_bytes(b"cut")
    assert "damaged" in ExpertLibrary.from_pretrained(library).check()["attention"]


def test_two_that_edit_at_once_lose_nothing(world: Path, library: Path) -> None:
    inside, go = threading.Event(), threading.Event()

    def slow() -> None:
        with ExpertLibrary.edit(library) as edited:
            inside.set()
            go.wait(10)
            edited.add("slow", world / "short")

    def fast() -> None:
        with ExpertLibrary.edit(library) as edited:
            edited.add("fast", world / "attention")

    threads = [threading.Thread(target=slow)]
    threads[0].start()
    assert inside.wait(10)
    threads.append(threading.Thread(target=fast))
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()
    go.set()
    for thread in threads:
        thread.join()
    assert list(ExpertLibrary.from_pretrained(library)) == ["sums", "lists", "slow", "fast"]


# ------------------------------------------------------------------------------------------------ the file

FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"format_version": 2}, "format_version 2.*Update peft-svf"),
    ({"format_version": None}, "`format_version` is missing"),
    ({"format_version": True}, "`format_version` must be a whole number"),
    ({"format_version": 0}, "`format_version` must be a positive"),
    ({"base_model": 3}, "`base_model` must be text"),
    ({"experts": None}, "`experts` is missing"),
    ({"experts": [1]}, "`experts` must be an object"),
    ({"experts__sums": "sums"}, "`experts.sums` must be an object"),
    ({"experts__a/b": {"path": "sums"}}, "`experts` has a wrong name.*'a/b'"),
    ({"experts__base": {"path": "sums"}}, "`experts` has a wrong name.*'base'"),
    ({"experts__sums__path": None}, "`experts.sums.path` or `hub_id` must be given"),
    ({"experts__sums__hub_id": "me/sums"}, "`experts.sums.path` or `hub_id` must be given"),
    ({"experts__sums__path": "../sums"}, "`experts.sums.path` must be a folder in"),
    ({"experts__sums__path": "a/../../b"}, "`experts.sums.path` must be a folder in"),
    ({"experts__sums__path": "~/sums"}, "`experts.sums.path` must be a folder in"),
    ({"experts__sums__path": "C:\\sums"}, "`experts.sums.path` must be a folder in"),
    ({"experts__sums__path": "away"}, "`experts.sums.path` must be a folder in"),  # a link that leads out
    ({"experts__sums__path": ""}, "`experts.sums.path` must be a folder in"),
    ({"experts__sums__revision": "v1"}, "`experts.sums.revision` belongs to a `hub_id`"),
    ({"experts__sums": {"hub_id": "/etc/passwd"}}, "`experts.sums.hub_id` must be a Hub id"),
    ({"experts__sums": {"hub_id": "../../x"}}, "`experts.sums.hub_id` must be a Hub id"),
    ({"experts__sums__description": ["a"]}, "`experts.sums.description` must be text"),
    ({"experts__sums__examples": "1 + 2"}, "`experts.sums.examples` must be a list"),
    ({"experts__sums__examples": ["a", 3]}, r"`experts.sums.examples`\[1\] must be text"),
    ({"experts__sums__scores": {"accuracy": "high"}}, "`experts.sums.scores`.accuracy must be a finite number"),
    ({"experts__sums__scores": {"accuracy": float("nan")}}, "`experts.sums.scores`.accuracy must be a finite number"),
    ({"experts__sums__descripton": "a"}, "`experts.sums.descripton` is no field"),
    ({"dispatch__method": "random"}, "`method` must be prompt, classifier, nearest, got 'random'"),
    ({"dispatch__method": "classifier"}, "`classifier` is needed"),
    ({"dispatch__classifier": {"path": "../c"}}, "`dispatch.classifier.path` must be a folder in"),
    ({"dispatch__settings": {"margin": 0.1}}, "`settings` has 'margin'"),
    ({"dispatch__settings": {"threshold": "0.5"}}, "`settings.threshold` must be a finite number"),
    ({"dispatch__settings": {"labels": {"nobody": "x"}}}, "`settings.labels`.*'nobody'"),
    ({"made_by": "others"}, "`made_by` is no field"),
]


@pytest.mark.parametrize(("fields", "said"), FIELDS, ids=[said for _, said in FIELDS])
def test_an_error_names_the_field(fields: dict[str, Any], said: str, library: Path, world: Path) -> None:
    (library / "away").symlink_to(world / "sums")
    change(library / "library.json", **fields)
    with pytest.raises(ValueError, match=said) as caught:
        ExpertLibrary.from_pretrained(library)
    assert str(library / "library.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format_version": 1}', b"\xff\xfe\x00"])
def test_a_damaged_file_is_refused(text: Any, library: Path) -> None:
    (library / "library.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"library\.json"):
        ExpertLibrary.from_pretrained(library)


def test_a_folder_without_a_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no library\.json"):
        ExpertLibrary.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        ExpertLibrary.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no library"), ExpertLibrary.edit(tmp_path / "new", create=False):
        pass
    assert not (tmp_path / "new").exists()


def test_a_failed_write_leaves_the_old_file(world: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (library / "library.json").read_text()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_svf.library.library.shutil.copyfile", full)
    with pytest.raises(OSError, match="No space"), ExpertLibrary.edit(library) as edited:
        edited.add("short", world / "short")
    assert (library / "library.json").read_text() == before
    assert not (library / "short").exists()
    assert ExpertLibrary.from_pretrained(library).check() == {}


def test_a_library_of_the_hub_names_no_path_outside_itself(
    world: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []

    def download(repo: str, revision: Any = None, allow_patterns: Any = ()) -> str:
        asked.append((repo, revision))
        assert not any("bin" in pattern or "pt" in pattern.split(".") for pattern in allow_patterns)
        if repo == "me/lost":
            raise OSError("404: nothing here\nmore")
        return str(library if repo == "me/library" else commit)

    commit = shutil.copytree(world / "short", library.parent / "0123abcd")
    monkeypatch.setattr("peft_svf.library.sources.snapshot_download", download)
    with ExpertLibrary.edit(library) as edited:
        edited.add("short", "me/short", revision="main")
    entry = json.loads((library / "library.json").read_text())["experts"]["short"]
    assert (entry["hub_id"], entry["revision"]) == ("me/short", "0123abcd")
    assert "path" not in entry
    found = ExpertLibrary.from_pretrained("me/library", revision="v1")
    assert asked[-1] == ("me/library", "v1")
    assert found.base_model is None  # a folder of the machine where it was made
    assert found.sources["short"] == "me/short@0123abcd"
    assert found.check() == {}
    assert asked[-1] == ("me/short", "0123abcd")
    change(library / "library.json", experts__sums__path=str(world / "sums"))
    assert ExpertLibrary.from_pretrained(library)["sums"].source == Source(path=world / "sums", linked=True)
    with pytest.raises(ValueError, match=r"`experts\.sums\.path` must be a folder in"):
        ExpertLibrary.from_pretrained("me/library")
    change(library / "library.json", experts__sums__path="sums", experts__short__hub_id="me/lost")
    lost = ExpertLibrary.from_pretrained("me/library")
    with pytest.raises(ValueError, match=r"Expert 'short' of the library is missing.*me/lost.*404: nothing here$"):
        lost.paths()


# ------------------------------------------------------------------------------------------------ where it is taken


def test_a_library_goes_where_a_mapping_of_experts_goes(world: Path, library: Path) -> None:
    with ExpertLibrary.edit(library) as edited:
        edited.set_dispatch("nearest", threshold=-1.0)
    found = ExpertLibrary.from_pretrained(library)
    mixture = load_experts(str(found.base_model), found)
    assert mixture.sources == {name: str(library / name) for name in ("sums", "lists")}
    adaptive = SelfAdaptiveModel(mixture.model, mixture.tokenizer, found)
    assert isinstance(adaptive.dispatcher, NearestDispatcher)
    assert adaptive.dispatcher(["1 + 2", "a cat"]).choices == ["sums", "lists"]
    asked = PromptDispatcher(mixture.model, mixture.tokenizer, found)
    assert asked.descriptions == {"sums": "about sums", "lists": "about lists"}
    direct = NearestDispatcher(mixture.model, mixture.tokenizer, found)
    assert direct.experts == ["sums", "lists"]
    found.set_dispatch("classifier", classifier=world / "classifier", labels={"sums": "math"})
    found.save_pretrained(library)
    assert (library / CLASSIFIER / WEIGHTS).exists()
    found = ExpertLibrary.from_pretrained(library)
    mixture = load_experts(str(found.base_model), found)
    asks: Any = SelfAdaptiveModel(mixture.model, mixture.tokenizer, found).dispatcher
    assert asks.adapter_name == CLASSIFIER
    assert asks.answers == ["math", "lists"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "nearest", "labels": {}}, "'labels'"),
        ({"method": "prompt", "classifier": "sums"}, "`classifier`"),
        ({"method": "classifier"}, "`classifier`"),
        ({"method": "prompt", "labels": {"nobody": "x"}}, "nobody"),
        ({"method": "mixture"}, "'mixture'"),
    ],
)
def test_a_wrong_dispatch_is_refused(settings: dict[str, Any], said: str, world: Path, library: Path) -> None:
    found = ExpertLibrary.from_pretrained(library)
    if "classifier" in settings:
        settings = {**settings, "classifier": world / settings["classifier"]}
    with pytest.raises(ValueError, match=said):
        found.set_dispatch(**settings)
    assert found.dispatch.method == "prompt"


# ------------------------------------------------------------------------------------------------ the command line


def test_the_commands_make_list_and_check_a_library(world: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("1 + 2\n3 + 4\n")
    folder = tmp_path / "library"
    more = ["--description", "[b]sums[/b]", "--examples", tmp_path / "prompts.txt", "--score", "mine=0.5"]
    made = run("library", "add", folder, f"sums={world / 'sums'}", *more)
    assert made.exit_code == 0, made.output
    again = run("library", "add", folder, f"sums={world / 'sums'}")
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    assert run("library", "add", folder, f"sums={world / 'lists'}", "--overwrite").exit_code == 0
    added = run("library", "add", folder, f"lists={world / 'lists'}", "--link", "--json")
    assert json.loads(added.stdout)["source"] == str(world / "lists")
    set_to = run("library", "dispatch", folder, "nearest", "--setting", "margin=0.1")
    assert set_to.exit_code == 0, set_to.output
    listed = json.loads(run("library", "list", folder, "--json").stdout)
    assert [each["name"] for each in listed["experts"]] == ["sums", "lists"]
    assert listed["experts"][0]["description"] == "[b]sums[/b]"
    assert listed["experts"][0]["examples"] == ["1 + 2", "3 + 4"]
    assert listed["dispatch"] == {"method": "nearest", "settings": {"margin": 0.1}}
    assert "[b]sums[/b]" in run("library", "list", folder).stdout
    wrong = run("library", "check", folder, "--json")
    assert wrong.exit_code == 1
    assert set(json.loads(wrong.stdout)["problems"]) == {"lists"}
    assert run("library", "dispatch", folder, "prompt").exit_code == 0
    assert run("library", "check", folder).exit_code == 0
    removed = run("library", "remove", folder, "lists")
    assert removed.exit_code == 0
    assert str(world / "lists") in removed.stdout
    for words in (
        ["remove", folder, "lists"],
        ["remove", tmp_path / "no", "a"],
        ["dispatch", tmp_path / "no", "prompt"],
    ):
        failed = run("library", *words)
        assert failed.exit_code == 1
        assert "Error" in failed.output
    assert not (tmp_path / "no").exists()


def test_the_answers_of_a_library_are_those_of_its_options(world: Path, library: Path) -> None:
    with ExpertLibrary.edit(library) as edited:
        edited.set_dispatch("nearest", threshold=-1.0)
    files = []
    for name in EXAMPLES:
        file = library.parent / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in EXAMPLES[name]))
        files += ["--nearest_examples", f"{name}={file}"]
    words = ["generate", "--prompt", "1 + 2", "--prompt", "a cat", "--max_new_tokens", "4", "--json"]
    experts = ["--expert", f"sums={world / 'sums'}", "--expert", f"lists={world / 'lists'}"]
    options = ["--model_name_or_path", world / "base", *experts, "--dispatch", "nearest", "--threshold", "-1"]
    by_library, by_options = run(*words, "--library", library), run(*words, *options, *files)
    assert by_library.exit_code == 0, by_library.output
    assert by_library.stdout == by_options.stdout
    assert [json.loads(line)["expert"] for line in by_library.stdout.splitlines()] == ["sums", "lists"]
    more = run(*words, "--library", library, "--expert", f"short={world / 'short'}", "--dispatch", "prompt")
    assert more.exit_code == 0, more.output
    assert set(json.loads(more.stdout.splitlines()[0])["probabilities"]) == {"sums", "lists", "short", "base"}
    assert "short" not in ExpertLibrary.from_pretrained(library)


def test_the_playground_takes_a_library(world: Path, library: Path) -> None:
    with ExpertLibrary.edit(library) as edited:
        edited.add("short", world / "short", link=True)
        edited.set_dispatch("classifier", classifier=world / "classifier")
        edited.remove("lists")  # its files stay
    assert experts_of(str(library)) == {"sums": str(library / "sums"), "short": str(world / "short")}


def test_search_and_evaluate_take_a_library(library: Path, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"prompt": text, "answer": "a"}) + "\n" for text in ("a b", "b c", "c d", "d e"))
    (tmp_path / "data.jsonl").write_text(rows)
    found = run(
        *("search", "--library", library, "--data", tmp_path / "data.jsonl", "--output_dir", tmp_path / "mixture"),
        *("--reward", "loglik", "--method", "cem", "--num_generations", "1", "--population_size", "3", "--json"),
    )
    assert found.exit_code == 0, found.output
    assert (tmp_path / "mixture" / "adapter_config.json").exists()
    with ExpertLibrary.edit(library) as edited:
        edited.set_dispatch("nearest", margin=0.5)
    evaluated = run(
        *("evaluate", "--library", library, "--task", f"sums={tmp_path / 'data.jsonl'}:all", "--json"),
        *("--output_dir", tmp_path / "evaluation", "--max_new_tokens", "2"),
    )
    assert evaluated.exit_code == 0, evaluated.output
    assert "nearest" in json.loads(evaluated.stdout)["accuracy"]
    inside = run("search", "--library", library, "--data", tmp_path / "data.jsonl", "--output_dir", library / "sums")
    assert inside.exit_code == 1
    assert "the folder of expert 'sums'" in inside.output
    same = run("search", "--library", library, "--data", tmp_path / "data.jsonl", "--output_dir", library)
    assert same.exit_code == 1
    assert "holds a library of experts" in same.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--library", "nowhere"], "There is no folder nowhere"),
        (["--library", "LIBRARY", "--expert", "sums=b"], "has an expert 'sums' already"),
        (["--library", "LIBRARY", "--expert", "base=b"], "the name of the base model"),
        (["--library", "LIBRARY", "--expert", "new=/nowhere"], "There is no folder /nowhere"),
        (["--library", "EMPTY"], "has no experts"),
    ],
)
def test_experts_of_a_command_that_cannot_be(words: list[str], said: str, library: Path) -> None:
    ExpertLibrary().save_pretrained(library.parent / "empty")
    places = {"LIBRARY": str(library), "EMPTY": str(library.parent / "empty")}
    result = run("generate", "--prompt", "a", *(places.get(word, word) for word in words))
    assert result.exit_code == 1
    assert said in result.output


def test_a_command_without_experts_or_model_is_a_matter_of_usage(library: Path) -> None:
    for words, option in (([], "--expert"), (["--expert", "a=b"], "--model_name_or_path")):
        result = run("generate", "--prompt", "a", *words)
        assert result.exit_code == 2
        assert f"{option}: It is missing. Pass it, or a --library." in " ".join(result.output.split())


def test_the_methods_are_the_same_everywhere() -> None:
    assert tuple(SETTINGS) == METHODS


def test_the_question_of_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = {"name": "x", "recipe": {}, "base_model": "m", "accuracy_before": None, "accuracy_after": None}
    record |= {"test_questions": 1, "trainable": 1, "seconds": 1.0, "best_step": None}
    card = tmp_path / "README.md"
    for question in ("What is 3 + 4?", "two\nlines"):
        card.write_text(training_card(record, "x", example=(question, "7")))
        assert question_of_card(card) == question
    card.write_text(training_card(record, "x"))
    assert question_of_card(card) is None
    card.write_text("> a quotation\n> of somebody\n")
    assert question_of_card(card) is None
