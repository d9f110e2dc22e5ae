"""SFT and DPO on TRL's trainers: options that their configs lack, and the columns that they train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from trl import DPOConfig, SFTConfig

from ..scoring.rewards import text_of

SUPERVISED = ("sft", "dpo")
_MOST_TOKENS = 256
_LENGTH = "Longest answer of the evaluation, in tokens. Default: the longest reference answer, at most 256."
# What TRL's trainers read beside the text. Any other column named "text" would be taken for the text.
_BESIDE = ("tools", "chat_template_kwargs", "image", "images")
_OF_OBJECTIVE = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}


@dataclass
class EvaluatedSFTConfig(SFTConfig):
    """TRL's `SFTConfig` with the length of the answers that the evaluation decodes."""

    max_completion_length: Optional[int] = field(default=None, metadata={"help": _LENGTH})


@dataclass
class EvaluatedDPOConfig(DPOConfig):
    """TRL's `DPOConfig` with the length of the answers that the evaluation decodes."""

    max_completion_length: Optional[int] = field(default=None, metadata={"help": _LENGTH})


def trained_columns(rows: Any, objective: str, text_column: str) -> Any:
    """Return only the columns that TRL's trainer of this objective needs: whole conversations, text, or pairs."""
    names = rows.column_names or list(next(iter(rows)))
    wanted = _OF_OBJECTIVE[objective]
    if objective == "sft":
        wanted = next((kind for kind in (("messages",), wanted, (text_column,)) if {*kind} <= {*names}), wanted)
    return rows.select_columns([name for name in names if name in (*wanted, *_BESIDE)])


def answer_length(rows: Sequence[Any], tokenizer: Any) -> int:
    """Return the number of tokens of the longest reference answer with its end token, at most 256.

    Without reference answers it is 256.
    """
    answers = [text_of(row["completion"]) for row in rows if row.get("completion")]
    longest = max((len(tokenizer(text)["input_ids"]) for text in answers), default=_MOST_TOKENS)
    return min(longest + 1, _MOST_TOKENS)
