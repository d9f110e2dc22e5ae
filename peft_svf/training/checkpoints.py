"""Checkpoints that survive a process killed at any moment: only complete ones are loaded."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..utils.files import read_text

_PREFIX = "checkpoint-"
_WEIGHTS = ("*.safetensors", "pytorch_model_fsdp*", "global_step*")  # of a single process, FSDP, DeepSpeed


def is_complete(folder: str | Path) -> bool:
    """Return whether a checkpoint of transformers' Trainer is complete. `trainer_state.json` is its last file."""
    folder = Path(folder)
    try:
        json.loads(read_text(folder / TRAINER_STATE_NAME))
        if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
            return False
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt"):
                pass
        # The first process does not wait for the random states of the others.
        return all(zipfile.is_zipfile(path) for path in folder.glob("rng_state_*.pth"))
    except (OSError, ValueError, SafetensorError):
        return False


def last_complete(output_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint in a trainer's output folder."""
    return next((folder for folder in _newest_first(output_dir) if is_complete(folder)), None)


def discard_incomplete(output_dir: str | Path) -> None:
    """Delete incomplete checkpoints, so that nothing loads them."""
    for folder in _newest_first(output_dir):
        if not is_complete(folder):
            warnings.warn(
                f"{folder} is incomplete and is deleted. An older checkpoint is used if there is one.", stacklevel=2
            )
            shutil.rmtree(folder)


def choose_checkpoint(training: Any) -> None:
    """
    Replace `resume_from_checkpoint` by the checkpoint to resume from, or `None`.

    Raises:
        ValueError: The output folder holds checkpoints of another run, or the given checkpoint is not complete.
    """
    resume, newest = training.resume_from_checkpoint, last_complete(training.output_dir)
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    if not resume and newest:
        raise ValueError(
            f"{training.output_dir} holds checkpoints of an earlier run, up to {newest.name}. Pass "
            "--resume_from_checkpoint true to continue it, or another --output_dir, or delete them."
        )
    if isinstance(resume, str) and not is_complete(resume):
        found = f"; the newest complete one in {training.output_dir} is {newest.name}" if newest else ""
        raise ValueError(f"There is no complete checkpoint in {resume}{found}.")
    if training.process_index == 0:
        discard_incomplete(training.output_dir)
    if resume is True:
        resume = str(newest) if newest else None
    training.resume_from_checkpoint = resume or None


def train_from_checkpoint(trainer: Any) -> None:
    """Train, from the chosen checkpoint if there is one. An error or Ctrl-C saves a checkpoint first."""
    training = trainer.args
    resume = training.resume_from_checkpoint
    if resume:
        saved = TrainerState.load_from_json(str(Path(resume) / TRAINER_STATE_NAME))
        if saved.global_step >= (training.max_steps if training.max_steps > 0 else saved.max_steps):
            # The trainer would train one more step.
            trainer.state = saved
            best = saved.best_model_checkpoint if training.load_best_model_at_end else None
            trainer.model.load_adapter(best or resume, "default", is_trainable=True)
            trainer.accelerator.print(f"The run of {resume} is finished; there is nothing left to train.")
            return
    try:
        trainer.train(resume_from_checkpoint=resume)
    except BaseException:
        # Several processes may have stopped at different steps.
        if trainer.accelerator.num_processes == 1 and training.save_strategy != "no":
            _save_after_error(trainer)
        raise


def _save_after_error(trainer: Any) -> None:
    step = trainer.state.global_step
    folder = Path(trainer.args.output_dir) / f"{_PREFIX}{step}"
    if step == 0:
        return
    if not is_complete(folder):
        try:
            trainer._save_checkpoint(trainer.model, None)
        except Exception as error:  # the error that stopped the training is raised afterwards
            warnings.warn(f"Step {step} could not be saved: {error}", stacklevel=2)
            return
    trainer.accelerator.print(
        f"Stopped after step {step}, saved in {folder}. Add --resume_from_checkpoint true to continue. "
        "The samples will differ from those of an uninterrupted run."
    )


def save_whole(trainer: Any, output_dir: str | Path) -> None:
    """Save a trainer's model. Each file in the output folder is complete at any moment; the weights come last.

    All ranks must call this.
    """
    output_dir = Path(output_dir)
    scratch = output_dir / ".saving"
    trainer.save_model(str(scratch), _internal_call=True)  # otherwise it pushes an unfinished folder to the Hub
    trainer.accelerator.wait_for_everyone()
    if not trainer.accelerator.is_main_process:
        return
    (scratch / "training_args.bin").unlink(missing_ok=True)  # a pickle, unsafe to load
    shutil.rmtree(scratch / "ref", ignore_errors=True)  # TRL's copy of the adapter that the training continued
    for path in sorted(scratch.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        if path.is_dir():
            shutil.rmtree(output_dir / path.name, ignore_errors=True)
        os.replace(path, output_dir / path.name)
    scratch.rmdir()


def _newest_first(output_dir: str | Path) -> list[Path]:
    folders = [path for path in Path(output_dir).glob(f"{_PREFIX}*") if path.is_dir()]
    numbered = [path for path in folders if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True)
