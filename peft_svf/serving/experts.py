"""Read an expert for an engine: the same checks as for a model in transformers, against the served bases."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..spectral.fingerprint import LABELS
from ..tuner.base_check import base_differences, refuse_base
from ..tuner.checkpoint import Checkpoint, adapter_tensors
from ..tuner.config import SVFConfig, load_svf_config


@dataclass(frozen=True)
class ServedModel:
    """What an expert is checked against.

    Attributes:
        names: The modules with a gate, of all stages of a pipeline.
        lengths (`dict[str, int]`): The served length of δ of each module in this process.
        fingerprints: The fingerprint and the shape `[out, in]` of each of them.
        base_check (`str`): As in `ServingOptions`.
    """

    names: Collection[str]
    lengths: Mapping[str, int]
    fingerprints: Mapping[str, tuple[Sequence[float], tuple[int, int]]]
    base_check: str = "error"


def read_expert(path: str, served: ServedModel) -> dict[str, torch.Tensor]:
    """Return δ of an expert by module, on the CPU.

    Args:
        path: Folder or Hub id.
        served: The served model.

    Raises:
        ValueError: There is no SVF adapter, or it is damaged, was made for another base model, or trains more than δ.
    """
    if not Path(path).exists() and Path(path).is_absolute():
        raise ValueError(f"There is no folder {path}. Pass the folder or the Hub id of an expert.")
    config = load_svf_config(path)
    checkpoint = config.checkpoint or Checkpoint.of_tensors(adapter_tensors(path), path)
    config.check_checkpoint(path, checkpoint)
    deltas = checked_deltas(path, checkpoint, served)
    _check_base(path, config, deltas, served)
    return deltas


def checked_deltas(subject: str, checkpoint: Checkpoint, served: ServedModel) -> dict[str, torch.Tensor]:
    """Return δ by module, if the engine can serve all of it.

    Raises:
        ValueError: It cannot, or a δ is damaged.
    """
    checkpoint.check(subject, dict.fromkeys(checkpoint.deltas))
    if checkpoint.others:
        raise ValueError(
            f"{subject} trains more than δ, such as {min(checkpoint.others)}. An engine serves δ only. Serve it as a "
            "merged model: `peft-svf export merged`."
        )
    if unknown := sorted(checkpoint.deltas.keys() - set(served.names)):
        raise ValueError(
            f"{subject} adapts {len(unknown)} modules that have no gate in this engine, the first is {unknown[0]}. "
            "Start the engine with a basis pack that has them, or use an expert of its model."
        )
    for name, shape in checkpoint.deltas.items():
        if shape[0] > served.lengths.get(name, shape[0]):
            raise ValueError(
                f"{subject} has {shape[0]} numbers in {name}, and the engine serves {served.lengths[name]}. Start it "
                "with a larger `r`, or with a basis pack of full `r`."
            )
    assert checkpoint.read is not None
    return {name: checkpoint.read(f"{name}.svf_delta.weight").detach().float().cpu() for name in checkpoint.deltas}


def _check_base(path: str, config: SVFConfig, deltas: Mapping[str, torch.Tensor], served: ServedModel) -> None:
    found = {name: served.fingerprints[name] for name in deltas if name in served.fingerprints}
    expected: dict[str, Sequence[float]] = {}
    for name, numbers in config.expected_fingerprint.items():
        # the samples are of the leading r singular vectors
        same = name in deltas and len(deltas[name]) == served.lengths.get(name)
        expected[name] = numbers if same else numbers[: len(LABELS)]
    differences, count = base_differences(expected, found, whole_model=False)
    if differences:
        refuse_base(
            path,
            differences,
            count,
            config,
            policy=served.base_check,
            override='start the engine with `base_check="warn"`',
        )
