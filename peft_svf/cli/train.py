"""`peft-svf train`."""

from __future__ import annotations

import json

import typer

from .errors import EXPECTED, in_a_line, prints_to_stderr
from .training_options import check_words


def train(context: typer.Context) -> None:
    """Train an expert: from pairs (sft), preferences (dpo) or rewards. `--help_all` lists all options, with TRL's.

    peft-svf train --objective sft --model_name_or_path MODEL --data pairs.jsonl --chat true --output_dir my-expert

    For several processes: `accelerate launch -m peft_svf train` with the same options.
    """
    as_json = "--json" in context.args
    words = ["--help" if word == "--help_all" else word for word in context.args]
    words = [word for word in words if word not in ("--json", "--overwrite")]
    with prints_to_stderr(as_json):
        with in_a_line(has_base_check=False):
            if "--help" not in words:
                check_words(words, "--overwrite" in context.args)
            from ..training.outcome import NothingLearnedError
            from ..training.run import prepare

            run = prepare(words)
        with in_a_line((*EXPECTED, NothingLearnedError), has_base_check=False):
            record = run()
    if as_json:
        print(json.dumps(record.to_dict(), default=str))
