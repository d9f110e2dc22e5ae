"""
Runs the test suite of the installed PEFT release with SVF in place of PEFT's own methods.

    python tests/peft_suite/run.py [arguments for pytest]

The tests come from the release's source distribution, because PEFT's wheel has none and because the tests of another
release describe another behaviour. What SVF is tested with is in `rows.py`, how it gets into the suite in `plugin.py`,
the models in `tiny_models.py`. Everything that is downloaded or made lies in `build/peft-suite/<version>/`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "peft-suite"

TEST_FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
)


def main() -> int:
    release = version("peft")
    folder = BUILD / release
    folder.mkdir(parents=True, exist_ok=True)
    unpack_tests(fetch_sdist(release, folder), folder)
    print(f"Test suite of PEFT {release} with SVF, in {folder}", flush=True)
    return run_pytest(folder, sys.argv[1:])


def fetch_sdist(release: str, folder: Path) -> Path:
    """The source distribution of a PEFT release, downloaded unless it is there already."""
    sdist = folder / f"peft-{release}.tar.gz"
    if not sdist.exists():
        with tempfile.TemporaryDirectory(dir=folder) as download:  # so that an interrupted download leaves nothing
            arguments = ["download", f"peft=={release}", "--no-deps", "--no-binary", "peft", "--dest", download]
            done = subprocess.run([sys.executable, "-m", "pip", *arguments])
            found = list(Path(download).glob("*.tar.gz"))
            if done.returncode != 0 or len(found) != 1:
                sys.exit(
                    f"Could not download the source distribution of peft {release} (pip's message is above). The tests "
                    f"of PEFT are only in there; without network, put it at {sdist}."
                )
            found[0].replace(sdist)
    return sdist


def unpack_tests(sdist: Path, folder: Path) -> None:
    """Unpack `tests/` and nothing else: with the sources next to it, the tests would not import the installed PEFT."""
    tests = folder / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder) as unpacked:
        with tarfile.open(sdist) as archive:
            inside = f"{sdist.name.removesuffix('.tar.gz')}/tests/"
            members = [member for member in archive.getmembers() if member.name.startswith(inside)]
            archive.extractall(unpacked, members, filter="data")
        Path(unpacked, inside).rename(tests)
    (tests / "__init__.py").touch()  # missing in the source distribution; the test files use relative imports


def run_pytest(folder: Path, arguments: list[str]) -> int:
    """Run the suite where no hub and no cache is seen but those in `folder`. Returns pytest's status."""
    # The tests name hub models; a folder of that name in the working directory goes first.
    models = fresh_folder(folder / "models")
    environment = os.environ | {
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # the matrices are tiny
        "PEFT_SVF_CACHE": str(fresh_folder(folder / "svf-cache")),  # no basis of yesterday's code
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(HERE / "stubs"), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "peft_suite.plugin", "-p", "no:cacheprovider"]
    command += ["-c", str(HERE / "pytest.ini"), "--rootdir", str(folder), "-k", "SVF", *arguments]
    command += [str(folder / "tests" / name) for name in TEST_FILES]
    return subprocess.run(command, cwd=models, env=environment).returncode


def fresh_folder(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
