"""Checkpoints that survive a process that is killed at any moment: only whole ones are ever loaded."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

_PREFIX = "checkpoint-"
# of a single process, of FSDP, of DeepSpeed
_WEIGHTS = ("*.safetensors", "pytorch_model_fsdp*", "global_step*")


def is_complete(folder: str | Path) -> bool:
    """Whether a checkpoint of transformers' Trainer was written to its end, which is `trainer_state.json`."""
    folder = Path(folder)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
        if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
            return False
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt"):
                pass
        # the first process does not wait for the others' random states
        return all(zipfile.is_zipfile(path) for path in folder.glob("rng_state_*.pth"))
    except (OSError, ValueError, SafetensorError):
        return False


def steps_done(folder: str | Path) -> tuple[int, int]:
    """The step of a checkpoint, and how many the run was to have."""
    state = json.loads((Path(folder) / TRAINER_STATE_NAME).read_text())
    return int(state["global_step"]), int(state["max_steps"])


def last_complete(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint in a trainer's output folder."""
    return next((folder for folder in _newest_first(output_dir) if is_complete(folder)), None)


def discard_incomplete(output_dir: str | Path) -> None:
    """Delete the checkpoints that were not written to their end, so that nothing loads them."""
    for folder in _newest_first(output_dir):
        if not is_complete(folder):
            warnings.warn(
                f"{folder} was not written to its end, and is deleted; an older checkpoint will do.", stacklevel=2
            )
            shutil.rmtree(folder)


def save_whole(trainer: Any, output_dir: str | Path) -> None:
    """Save the model of a trainer to its output folder, where the files appear whole, the weights last. All ranks must
    call it."""
    output_dir = Path(output_dir)
    scratch = output_dir / ".saving"
    trainer.save_model(str(scratch), _internal_call=True)  # or it would push to the Hub, half done
    trainer.accelerator.wait_for_everyone()
    if not trainer.accelerator.is_main_process:
        return
    (scratch / "training_args.bin").unlink(missing_ok=True)  # a pickle, for nobody to load
    for path in sorted(scratch.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        if path.is_dir():
            shutil.rmtree(output_dir / path.name, ignore_errors=True)
        os.replace(path, output_dir / path.name)
    scratch.rmdir()


def _newest_first(output_dir: str | Path) -> list[Path]:
    folders = [path for path in Path(output_dir).glob(f"{_PREFIX}*") if path.is_dir()]
    numbered = [path for path in folders if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True)
