"""Model cards: of a training, a mixture, a merged model, and what is added to the card of any SVF adapter.

The text of each card is in `templates/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

TEMPLATES = Path(__file__).parent / "templates"
TAGS = ("peft", "svf", "transformer-squared")
MARK = (
    "<!-- Written by peft-svf, and overwritten when a mixture is saved here. Delete this line to keep your changes. -->"
)
_MARK_BEGINS = MARK.partition(",")[0]
# the section of PEFT's card template, if nobody has filled it in
_UNFILLED = re.compile(
    r"## How to Get Started with the Model\s+Use the code below to get started with the model\.\s+"
    r"\[More Information Needed\]"
)
# as `templates/training_card.md` shows an example
_QUESTION = re.compile(r"^((?:>(?: .*)?\n)+)>\n> \*\*.*\*\*$", re.MULTILINE)
_ADAPTER = re.compile(r'(PeftModel\.from_pretrained\(base_model, )"[^"]*"')


def _render(template: str, data: ModelCardData, **values: Any) -> ModelCard:
    return ModelCard.from_template(data, template_path=str(TEMPLATES / f"{template}.md"), **values)


def loading_code(base_model: str | None, adapter: str, revision: str | None = None, *, svf: bool = True) -> str:
    """Return Python code that loads an adapter.

    If the name of the base model is neither a Hub id nor a folder, the reader has to fill it in.
    """
    lines = ["import peft_svf  # registers SVF with PEFT, which otherwise raises KeyError: 'SVF'"] if svf else []
    lines += ["from peft import PeftModel"]
    if base_model and re.fullmatch(r"[\w./~-]+", base_model):
        version = f", revision={revision!r}" if revision else ""
        lines += [
            "from transformers import AutoModelForCausalLM",
            "",
            f'base_model = AutoModelForCausalLM.from_pretrained("{base_model}"{version})',
        ]
    else:
        lines += ["", f"# base_model: {base_model or 'the model that the adapter was trained on'}"]
    lines += [f'model = PeftModel.from_pretrained(base_model, "{adapter}")']
    return "\n".join(lines)


def complete_card(path: Path, base_model: str | None, adapter: str, revision: str | None = None) -> None:
    """Add tags and the code that loads the adapter to a card, unless it has them."""
    card = ModelCard.load(path, ignore_metadata_errors=True)
    section = _render("loading", ModelCardData(tags=list(TAGS)), code=loading_code(base_model, adapter, revision))
    card.data.tags = sorted({*(card.data.tags or []), *TAGS})
    if "import peft_svf" not in card.text:
        added = section.text.strip()
        text, count = _UNFILLED.subn(lambda _: added, card.text)
        card.text = text if count else f"{card.text.rstrip()}\n\n{added}\n"
    card.save(path)


def publish_card(path: Path, base_model: str | None, repo_id: str, revision: str | None = None) -> None:
    """Prepare a card for the Hub: name the repository in place of local folders, and complete it.

    A new card is written if there is none.
    """
    if path.exists():
        card = ModelCard.load(path, ignore_metadata_errors=True)
        card.text = _ADAPTER.sub(rf'\1"{repo_id}"', card.text)
    else:
        card = _render("expert_card", ModelCardData(), name=repo_id.split("/")[-1])
    if Path(str(card.data.base_model or "")).exists():
        card.data.base_model = None  # a local folder means nothing to others
    card.save(path)
    complete_card(path, base_model, repo_id, revision)


def training_card(
    record: Mapping[str, Any],
    adapter: str,
    *,
    example: tuple[str, str] | None = None,
    images: Sequence[str] = (),
    svf: bool = True,
) -> str:
    """
    Return the card of a trained adapter.

    Args:
        record: The content of `training.json`, see `Record.to_dict` in `training/report.py`.
        adapter: The folder of the adapter, for the code that loads it.
        example: A question and its reference answer.
        images: Markdown of the plots.
        svf: Whether it is an SVF adapter.
    """
    recipe, base_model = record["recipe"], record["base_model"]
    objective = recipe.get("objective", "grpo")
    before, after = record["accuracy_before"], record["accuracy_after"]
    header = ModelCardData(
        library_name="peft", base_model=base_model, tags=["peft", *(TAGS[1:] if svf else ()), objective]
    )
    card = _render(
        "training_card",
        header,
        name=record["name"],
        kind="An SVF expert vector" if svf else f"A {str(recipe.get('peft_type', 'PEFT')).upper()} adapter",
        base_model=base_model,
        objective=objective.upper(),
        continues=_shown(record["continues"]) if record.get("continues") else "",
        question="\n".join(f"> {line}" for line in example[0].splitlines()) if example else "",
        answer=example[1] if example else "",
        test_questions=record["test_questions"],
        accuracy="" if after is None else f"{'' if before is None else f'{before:.3f} before, '}**{after:.3f}** after",
        categories=", ".join(f"{name} {value:.3f}" for name, value in record.get("accuracy_by_category", {}).items()),
        measures=[(name, f"{old:.3f}", f"{new:.3f}") for name, (old, new) in record.get("measures", {}).items()],
        trainable=f"{record['trainable']:,}",
        seconds=f"{record['seconds']:.0f}",
        best_step=record["best_step"],
        images="\n".join(images),
        code=loading_code(base_model, adapter, svf=svf),
        recipe=yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip(),
    )
    return f"{str(card).rstrip()}\n"


def question_of_card(path: Path) -> str | None:
    """Return the example question in the card of a trained adapter, `None` if there is none."""
    found = _QUESTION.search(path.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(line[2:] for line in found[1].splitlines()) if found else None


def mixture_card(
    name: str,
    base_model: str | None,
    sources: Mapping[str, str],
    weights: Mapping[str, float],
    result: Any | None,
) -> str:
    """
    Return the card of a saved mixture. Local folders are named without their path.

    Args:
        name: Name of the mixture.
        base_model: Name of the base model.
        sources: Folder or Hub id of each expert.
        weights: α of each expert.
        result ([`MixtureResult`], *optional*): The search that chose them.
    """
    shared_base = None if base_model is None or Path(base_model).exists() else base_model
    header = ModelCardData(library_name="peft", base_model=shared_base, tags=[*TAGS, "mixture"])
    card = _render(
        "mixture_card",
        header,
        mark=MARK,
        name=name,
        base=_shown(base_model) if base_model else "",
        several=result is not None and len(result.groups) > 1,
        experts=[(expert, _shown(sources.get(expert, "")), alpha) for expert, alpha in weights.items()],
        result=result,
        expected=", ".join(f"{each} {mean:.3f}" for each, mean in result.expected.items()) if result else "",
        code=loading_code(shared_base, name),
    )
    return f"{str(card).rstrip()}\n"


def is_mixture_card(path: Path) -> bool:
    """Whether the file is a card of `mixture_card` whose mark nobody has deleted."""
    return _MARK_BEGINS in path.read_text(encoding="utf-8", errors="replace")


def merged_card(expert: str, base: str, count: int) -> str:
    """Return the card of a model with an expert merged into `count` weights. Local folders are named without path."""
    header = ModelCardData(base_model=None if Path(base).is_dir() else base, tags=list(TAGS[1:]))
    values = {"base": _shown(base), "expert": Path(expert).name, "count": count}
    return f"{str(_render('merged_card', header, **values)).rstrip()}\n"


def _shown(source: str) -> str:
    """A Hub id as it is. Only the name of a local folder, as the rest of its path means nothing elsewhere."""
    return Path(source).name if Path(source).exists() else source
