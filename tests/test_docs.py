"""README and `docs/`: the code runs, commands, files and links exist, sentences are short.

The code of a page runs from top to bottom in one namespace, in a folder where the Hub ids of the docs are folders with
a tiny random model. A block that needs more than that is marked, with its reason, by a line before its fence:

    <!-- not run: needs vLLM -->
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import warnings
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from peft import PeftConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_svf import SVFConfig, SVFRuntimeConfig

ROOT = Path(__file__).parent.parent
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
EXPERTS = ("math", "logic", "classifier")
LONGEST = 35  # words in a sentence
MOST_NOT_RUN = 6

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "lab-notes" not in page.parts]
PROSE = [page for page in PAGES if "results" not in page.parts]  # those tables are written by the benchmarks
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run: (needs .+) -->\n\s*$")


@dataclass
class Block:
    """A fenced block of code: its language, text, first line in the page, and why it is not run."""

    language: str
    code: str
    line: int
    not_run: str | None


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()])
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Block(match[2], match[3], line, mark and mark[1]))
    return found


def python_of(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language == "python"]


# ---------------------------------------------------------------------------------------------------- python


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that it reads whatever a page asks."""
    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages speak of: a base model, a fine-tuned one, experts, and examples."""
    folder, tokenizer = tmp_path_factory.mktemp("world"), byte_tokenizer()

    def base(seed: int = 0) -> Any:
        return tiny_llama(seed, vocab_size=len(tokenizer), pad_token_id=2, eos_token_id=1, max_position_embeddings=2048)

    for name, seed in ((MODEL, 0), ("finetuned-model", 1)):
        base(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for seed, name in enumerate(EXPERTS):
        config = SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        config.runtime_config = SVFRuntimeConfig(use_cache=False)  # this runs before a test has its own cache
        model = get_peft_model(base(), config)
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if "svf_delta" in parameter_name:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.peft_config["default"].base_model_name_or_path = MODEL
        model.save_pretrained(folder / "experts" / name)
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def small_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of a few tokens, whatever a page asks for."""
    from trl import GRPOConfig

    original = GRPOConfig.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"max_steps": 1, "max_completion_length": 4, "report_to": "none", "disable_tqdm": True}
        kwargs |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
        kwargs |= {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
        original(self, *args, **kwargs)

    monkeypatch.setattr(GRPOConfig, "__init__", init)


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=name_of)
def test_code_runs(
    page: Path, world: Path, tmp_path: Path, small_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {"__name__": "docs"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random model earns no rewards, for one
        for block in python_of(page):
            # empty lines before it, so that a traceback gives the line of the page
            code = compile("\n" * (block.line - 1) + block.code, name_of(page), "exec")
            if not block.not_run:
                exec(code, namespace)


def test_few_blocks_are_not_run() -> None:
    """Print which, with their reasons."""
    blocks = [(page, block) for page in PAGES for block in python_of(page) if block.not_run]
    left = [f"{name_of(page)}:{block.line} {block.not_run}" for page, block in blocks]
    print("\n".join(["", f"{len(left)} blocks are not run:", *left]))
    assert len(left) <= MOST_NOT_RUN, left
    marks = sum(len(re.findall(r"^<!-- not run:", page.read_text(), flags=re.MULTILINE)) for page in PAGES)
    assert marks == len(left), "A mark is not right before a block of Python, or gives no reason."


# ---------------------------------------------------------------------------------------------------- commands


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command in blocks of bash, and in spans of code that begin with `peft-svf`."""
    lines = []
    for block in blocks_of(page):
        if block.language == "bash":
            lines += block.code.replace("\\\n", " ").splitlines()
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    lines += re.findall(r"`(peft-svf [^`A-Z]+)`", prose)  # without placeholders such as COMMAND
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def arguments_of_peft_svf(words: list[str]) -> list[str] | None:
    if "peft-svf" in words:
        return words[words.index("peft-svf") + 1 :]
    if "peft_svf" in words:  # python -m peft_svf, accelerate launch -m peft_svf
        return words[words.index("peft_svf") + 1 :]
    return None


def options_of_training() -> set[str]:
    from peft_svf.training.arguments import OBJECTIVES, AdapterArguments, TrainArguments

    kinds: list[Any] = [TrainArguments, AdapterArguments, *(config for config, _ in OBJECTIVES.values())]
    return {f"--{each.name}" for kind in kinds for each in fields(kind)} | {"--config", "--data", "--help"}


def check_command(words: list[str]) -> None:
    typer = pytest.importorskip("typer")
    from peft_svf.cli.app import app

    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("--"):
        assert rest[0] in command.commands, f"There is no command {rest[0]!r}."
        command = command.commands[rest.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    known = options_of_training() if command.name == "train" else known | {"--help"}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{command.name} has no option {word}."


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=name_of)
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for words in commands_of(page):
        arguments = arguments_of_peft_svf(words)
        if arguments is not None:
            check_command(arguments)
        elif words[0] == "make":
            assert words[1] in targets, f"The Makefile has no target {words[1]!r}."


def test_a_command_that_is_not_there_is_found() -> None:
    check_command(["export", "lora", "experts/math", "--rank=64"])
    check_command(["train", "--num_generations", "8"])
    for words in (["serch"], ["generate", "--no_such_option", "1"], ["train", "--no_such_option"]):
        with pytest.raises(AssertionError, match=r"no command 'serch'|no option --no_such_option"):
            check_command(words)


# ---------------------------------------------------------------------------------------------------- text


def listed_in(page: str) -> set[str]:
    """The names in the first column of the tables of a page."""
    rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_every_setting_is_listed() -> None:
    from peft_svf import SearchConfig

    page = (ROOT / "docs/reference/search.md").read_text(encoding="utf-8")
    for each in fields(SearchConfig):  # in the words of the config, so that nothing is described twice
        default = each.default_factory() if each.default is MISSING else each.default  # type: ignore[misc]
        assert f"| `{each.name}` | `{default!r}` | {each.metadata['help']} |\n" in page
    ours = {each.name for kind in (SVFConfig, SVFRuntimeConfig) for each in fields(kind)}
    ours -= {each.name for each in fields(PeftConfig)}
    assert ours <= listed_in("docs/reference/svf-config.md")


def headings_of(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} is not there."
        if anchor:
            assert anchor in headings_of(linked), f"{target}: there is no such heading."
    for path in re.findall(r"(?<![\w/.])((?:benchmarks|examples|tests|docs)/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), f"{path} is not there."


def sentences_of(page: Path) -> list[str]:
    """Of the prose: no code, tables, headings or comments. Each item of a list is a separate text."""
    text = FENCE.sub("\n\n", page.read_text(encoding="utf-8"))
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^(\||#|    ).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`\n]+`", "code", text)
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    return [sentence for part in parts for sentence in re.split(r"(?<=[.!?])[*_\"')]*\s+", " ".join(part.split()))]


def words_in(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_sentences_are_short(page: Path) -> None:
    long = [sentence for sentence in sentences_of(page) if words_in(sentence) > LONGEST]
    assert not long, "\n".join(f"{words_in(sentence)} words: {sentence}" for sentence in long)
