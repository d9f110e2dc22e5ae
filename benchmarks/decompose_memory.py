"""Question: how much memory does decomposing the files of a model take?

    python benchmarks/decompose_memory.py [--model llama-3-8b] [--layers 2]

Random bf16 weights of that shape, in files, are decomposed into a basis pack. The peak is that of the whole process
less what it had before, files that are mapped included.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import torch
from common import SHAPES, Record, argument_parser, parse
from transformers import AutoModelForCausalLM

from peft_svf.interop import decompose


def main() -> None:
    arguments = parse(argument_parser(__doc__, rounds=1))
    name, layers = arguments.model or "llama-3-8b", 1 if arguments.quick else arguments.layers or 2
    record = Record(arguments, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        weights = write_weights(name, layers, Path(folder, "model"))
        before, start = resident(), time.perf_counter()
        with Peak() as peak:
            pack = decompose(Path(folder, "model"), Path(folder, "pack"))
        seconds = time.perf_counter() - start
    row = [name, str(layers), f"{weights / 2**30:.2f}", str(len(pack.modules)), f"{before / 2**30:.2f}"]
    record.table(
        "memory in GiB",
        ["model", "layers", "files", "weights", "before", "peak above that", "seconds"],
        [[*row, f"{(peak.value - before) / 2**30:.2f}", f"{seconds:.0f}"]],
    )
    record.write()


def write_weights(name: str, layers: int, folder: Path) -> int:
    """Bytes on disk. The model is gone from memory afterwards."""
    config = type(SHAPES[name])(**{**SHAPES[name].to_dict(), "num_hidden_layers": layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="1GB")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def resident() -> int:
    """Bytes of this process in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


class Peak:
    """The most that was resident, looked at fifty times a second."""

    def __enter__(self) -> Peak:
        self.value, self._stop = resident(), False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop:
            self.value = max(self.value, resident())
            time.sleep(0.02)


if __name__ == "__main__":
    main()
