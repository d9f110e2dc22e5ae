"""The cache of singular bases: it saves time, never changes a result, and never stands in the way."""

from __future__ import annotations

import errno
import os
import pickle
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from peft import get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peft_svf import SVFConfig, SVFRuntimeConfig
from peft_svf.spectral import (
    BasisCache,
    SingularBasis,
    cache,
    clear_cache,
    default_cache_dir,
    list_cache,
    singular_basis,
    weight_key,
)
from peft_svf.spectral import lock as lock_module


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that were decomposed since the test began."""
    names: list[str] = []

    def spy(weight: torch.Tensor, r: int | None = None, *, name: str = "weight") -> SingularBasis:
        names.append(name)
        return singular_basis(weight, r, name=name)

    monkeypatch.setattr(cache, "singular_basis", spy)
    return names


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught]


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root ignores permissions."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if uid == 0:
            os.seteuid(uid)


def assert_same(found: SingularBasis, expected: SingularBasis) -> None:
    """Bit for bit, dtype included."""
    for name in ("vectors", "spectrum"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert found.vectors.is_contiguous()


def entry_path(weight: torch.Tensor) -> Path:
    return default_cache_dir() / f"{weight_key(weight)}.safetensors"


def assert_recomputed_and_repaired(weight: torch.Tensor, computed: list[str], message: str) -> None:
    """One load warns and computes, the next one reads what the first one wrote."""
    computed.clear()
    path = entry_path(weight)
    with pytest.warns(UserWarning, match=message) as caught:
        found = BasisCache().load_or_compute(weight, name="w")
    # once before and once under the lock
    assert all(str(path) in str(warning.message) for warning in caught)
    assert_same(found, singular_basis(weight))
    with recorded_warnings() as messages:
        assert_same(BasisCache().load_or_compute(weight, name="w"), singular_basis(weight))
    assert messages == []
    assert computed == ["w"]


# ---------------------------------------------------------------------------------------------------- hits and keys


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 1)])
def test_a_hit_is_bit_equal_and_computes_nothing(
    shape: tuple[int, int], dtype: torch.dtype, computed: list[str]
) -> None:
    weight = torch.randn(shape).to(dtype)
    first = BasisCache().load_or_compute(weight, name="one")
    again = BasisCache().load_or_compute(weight.clone(), name="another")
    assert_same(first, singular_basis(weight))
    assert_same(again, first)
    assert computed == ["one"]


def test_the_key_ignores_the_memory_layout(computed: list[str]) -> None:
    weight = torch.randn(6, 8)
    padded = torch.randn(6, 20)
    padded[:, 2:18:2] = weight
    layouts = [weight, weight.T.contiguous().T, padded[:, 2:18:2], nn.Parameter(weight)]
    assert len({weight_key(layout) for layout in layouts}) == 1
    found = [BasisCache().load_or_compute(layout) for layout in layouts]
    for other in found[1:]:
        assert_same(other, found[0])
    assert len(computed) == 1


def test_the_key_holds_values_shape_and_dtype() -> None:
    weight = torch.randn(4, 6).half()
    changed = weight.clone()
    changed.view(torch.int16)[2, 3] ^= 1  # the last bit of one value
    same_bytes = [weight.view(torch.bfloat16), weight.reshape(6, 4), weight.reshape(2, 12)]
    others = [changed, weight.float(), weight.T, *same_bytes]
    keys = {weight_key(w) for w in (weight, *others)}
    assert len(keys) == 1 + len(others)
    assert all(len(key) == 64 and int(key, 16) for key in keys)


def test_a_narrower_basis_is_served_from_the_full_entry(computed: list[str]) -> None:
    """Attach with r = 3, with all, with r = 5: the weight is decomposed once, in full."""
    weight = torch.randn(8, 12)
    for r in (3, None, 5):
        layer = nn.Linear(12, 8, bias=False)
        layer.weight.data.copy_(weight)
        model = get_peft_model(nn.Sequential(layer), SVFConfig(r=r, target_modules=["0"]))
        basis = model.base_model.model[0].basis
        assert torch.equal(basis, singular_basis(weight, r).vectors)
    assert len(computed) == 1
    [entry] = list_cache()
    assert load_file(entry.path)["vectors"].shape == (8, 8)


def test_a_bad_weight_is_named_and_leaves_no_entry() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.up_proj"):
        BasisCache().load_or_compute(torch.full((3, 4), float("nan")), name="layers.0.up_proj")
    assert list_cache() == []


# ---------------------------------------------------------------------------------------------------- where it lives


def test_place_by_default_by_variable_and_by_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[str]
) -> None:
    for value in (None, ""):
        monkeypatch.delenv("PEFT_SVF_CACHE") if value is None else monkeypatch.setenv("PEFT_SVF_CACHE", value)
        assert default_cache_dir() == Path(HF_HOME) / "peft_svf"

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PEFT_SVF_CACHE", "~/by variable")
    weight = torch.randn(3, 4)
    BasisCache().load_or_compute(weight)
    BasisCache(tmp_path / "by argument").load_or_compute(weight)
    BasisCache("~/by argument").load_or_compute(weight)
    assert len(computed) == 2
    for name in ("by variable", "by argument"):
        assert [entry.path.parent for entry in list_cache(tmp_path / name)] == [tmp_path / name]


@pytest.mark.parametrize("use_cache", [True, False])
def test_runtime_config_chooses_the_place(tmp_path: Path, use_cache: bool) -> None:
    runtime = SVFRuntimeConfig(cache_dir=str(tmp_path / "here"), use_cache=use_cache)
    get_peft_model(nn.Sequential(nn.Linear(4, 3)), SVFConfig(target_modules=["0"], runtime_config=runtime))
    assert len(list_cache(tmp_path / "here")) == use_cache
    assert list_cache() == []


def test_list_and_clear() -> None:
    weights = [torch.randn(3, 4), torch.randn(7, 5).bfloat16()]
    bases = BasisCache()
    for weight in weights:
        bases.load_or_compute(weight)
    folder = default_cache_dir()
    (folder / f"{'0' * 16}-{'1' * 32}.tmp").write_bytes(b"x" * 100)  # of a process that was killed while writing
    (folder / "notes.txt").write_text("not ours")
    save_file({"x": torch.ones(1)}, folder / f"{'a' * 64}.safetensors")
    (folder / f"{'b' * 64}.safetensors").write_bytes(b"x" * 10)

    entries = list_cache()
    assert {entry.key: (entry.shape, entry.dtype) for entry in entries} == {
        weight_key(weights[0]): ((3, 4), "float32"),
        weight_key(weights[1]): ((7, 5), "bfloat16"),
    }
    assert all(entry.path.stat().st_size == entry.size for entry in entries)

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "notes.txt")
    assert clear_cache() == size
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["notes.txt"]
    assert (clear_cache(), list_cache()) == (0, [])
    assert (clear_cache(folder / "none"), list_cache(folder / "none")) == (0, [])


# ---------------------------------------------------------------------------------------------------- damage


def flipped(content: bytes, position: int, mask: int) -> bytes:
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


def marked_pickle(marker: Path) -> bytes:
    class Payload:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return Path.touch, (marker,)

    return pickle.dumps({"vectors": Payload(), "spectrum": Payload()})


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: flipped(content, 3, 0xFF), id="header length"),
        pytest.param(lambda content: flipped(content, 40, 0xFF), id="header"),
        pytest.param(lambda content: flipped(content, len(content) - 1, 0x01), id="last bit of the data"),
        pytest.param(lambda content: flipped(content, content.index(b"}}") + 9, 0x80), id="first of the data"),
        pytest.param(lambda content: content[:-1], id="one byte short"),
        pytest.param(lambda content: content[:100], id="cut in the header"),
        pytest.param(lambda content: content[:5], id="a few bytes"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content + b"\0", id="one byte more"),
    ],
)
def test_a_damaged_entry_is_computed_again(damage: Callable[[bytes], bytes], computed: list[str]) -> None:
    weight = torch.randn(5, 9)
    BasisCache().load_or_compute(weight)
    content = entry_path(weight).read_bytes()
    entry_path(weight).write_bytes(damage(content))
    assert_recomputed_and_repaired(weight, computed, "cannot be read|is damaged")
    assert len(list_cache()) == 1


def test_no_changed_byte_can_change_a_result() -> None:
    """Every byte of an entry in turn: the basis is right and the cache can be listed, also where the header still makes
    sense (`F64` and `I64` differ in one byte)."""
    weight = torch.randn(2, 3)
    expected = BasisCache().load_or_compute(weight)
    path, wrong = entry_path(weight), []
    content = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for position in range(len(content)):
            for mask in (0x01, 0x0F):
                path.write_bytes(flipped(content, position, mask))
                context = content[max(0, position - 9) : position + 9]
                try:
                    list_cache()
                    assert_same(BasisCache().load_or_compute(weight), expected)
                except Exception as error:
                    wrong.append((position, mask, context, repr(error)[:80]))
    assert wrong == []


OTHER_WEIGHTS = {
    "same shape": torch.ones(5, 9).tril(),
    "another shape": torch.ones(5, 7).tril(),
    "another dtype": torch.ones(5, 9).tril().bfloat16(),
    "other k": torch.ones(4, 9).tril(),
}


@pytest.mark.parametrize("other", OTHER_WEIGHTS.values(), ids=OTHER_WEIGHTS)
def test_the_entry_of_another_weight_is_not_believed(other: torch.Tensor, computed: list[str]) -> None:
    """A sound file under the wrong name, as a careless copy or sync leaves it."""
    weight = torch.randn(5, 9)
    for w in (weight, other):
        BasisCache().load_or_compute(w)
    shutil.copy(entry_path(other), entry_path(weight))
    assert_recomputed_and_repaired(weight, computed, "Singular basis")


def test_a_file_without_a_checksum_is_not_believed(computed: list[str]) -> None:
    weight = torch.randn(5, 9)
    save_file({"vectors": torch.eye(5), "spectrum": torch.ones(5).double()}, entry_path(weight))
    assert_recomputed_and_repaired(weight, computed, "Singular basis")


def test_a_pickle_is_never_opened(tmp_path: Path, computed: list[str]) -> None:
    weight, marker = torch.randn(5, 9), tmp_path / "executed"
    entry_path(weight).write_bytes(marked_pickle(marker))
    assert_recomputed_and_repaired(weight, computed, "cannot be read")
    assert not marker.exists()
    with safe_open(entry_path(weight), framework="pt") as file:  # and what is written is no pickle either
        assert set(file.keys()) == {"vectors", "spectrum"}


# ------------------------------------------------------------------------------------- folders and disks that refuse


@pytest.fixture(params=["below a file", "read-only", "no access"])
def refusing_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A cache folder that an ordinary user cannot write; it is in use only inside `unprivileged`."""
    if request.param == "below a file":
        (tmp_path / "file").touch()
        yield tmp_path / "file" / "cache"
        return
    top = Path(tempfile.mkdtemp())  # pytest's own folders admit their owner only
    folder = top / "cache"
    folder.mkdir()
    top.chmod(0o555)
    folder.chmod(0o555 if request.param == "read-only" else 0o000)
    yield folder
    for path in (top, folder):
        path.chmod(0o755)
    shutil.rmtree(top)


def test_a_folder_that_cannot_be_written_is_one_warning(refusing_folder: Path) -> None:
    weights = [torch.randn(3, 5) for _ in range(4)]
    with unprivileged(), recorded_warnings() as messages:
        bases = BasisCache(refusing_folder)
        found = [bases.load_or_compute(weight) for weight in weights]
    assert len(messages) == 1
    assert str(refusing_folder) in messages[0]
    assert "PEFT_SVF_CACHE" in messages[0]
    for basis, weight in zip(found, weights, strict=True):
        assert_same(basis, singular_basis(weight))


def test_attaching_to_a_model_goes_on_without_the_cache(refusing_folder: Path) -> None:
    config = SVFConfig(target_modules=["0", "1"], runtime_config=SVFRuntimeConfig(cache_dir=str(refusing_folder)))
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    x = torch.randn(2, 6)
    expected = model(x)
    with unprivileged(), recorded_warnings() as messages:
        adapted = get_peft_model(model, config)
    assert torch.equal(adapted(x), expected)
    assert [str(refusing_folder) in message for message in messages] == [True]


def test_a_read_only_folder_still_serves_what_it_has(computed: list[str]) -> None:
    """Such as one that another user filled: entries get the permissions of ordinary files."""
    weight = torch.randn(3, 5)
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        umask = os.umask(0o022)
        first = BasisCache(name).load_or_compute(weight)
        os.umask(umask)
        for path in (Path(name), Path(name, ".locks")):
            path.chmod(0o555)
        with unprivileged(), recorded_warnings() as messages:
            again = BasisCache(name).load_or_compute(weight)
        os.chmod(name, 0o755)
    assert_same(again, first)
    assert (len(computed), messages) == (1, [])


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=["OSError", "SafetensorError"],
)
def test_a_full_disk_is_one_warning_and_leaves_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(tensors: dict, path: str, metadata: dict) -> None:
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(cache, "save_file", run_out)
    weights, bases = [torch.randn(3, 5) for _ in range(4)], BasisCache()
    with recorded_warnings() as messages:
        for weight in weights:
            assert_same(bases.load_or_compute(weight), singular_basis(weight))
    assert len(messages) == 1
    assert "No space left" in messages[0]
    assert [path for path in default_cache_dir().iterdir() if path.is_file()] == []


def test_threads_that_fail_together_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in attaching to a model on several cores: all get as far as the lock before the first of them fails."""
    count = 8
    barrier = threading.Barrier(count)

    class NoLocks(FileLock):
        def acquire(self, *args: object, **kwargs: object) -> None:
            barrier.wait(60)
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module, "FileLock", NoLocks)
    weights = [torch.randn(3, 5) for _ in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(count) as pool:
            for _ in range(30):  # it is a matter of luck
                with recorded_warnings() as messages:
                    found = list(pool.map(BasisCache().load_or_compute, weights))
                assert len(messages) == 1
                clear_cache()
    finally:
        sys.setswitchinterval(interval)
    for basis, weight in zip(found, weights, strict=True):
        assert_same(basis, singular_basis(weight))


# ---------------------------------------------------------------------------------------------------- two processes

WORKER = """
import sys, torch
from peft_svf.spectral import BasisCache, cache, singular_basis, weight_key

def spy(weight, r=None, *, name="weight"):
    print("computing", name, flush=True)
    if name in ("0", "8"):
        sys.stdin.readline()  # hold the lock until told to go on
    return singular_basis(weight, r, name=name)

cache.singular_basis = spy
bases = BasisCache()
for i, weight in enumerate(torch.load(sys.argv[1], weights_only=True)):
    print("has", weight_key(bases.load_or_compute(weight, name=str(i)).vectors), flush=True)
"""


class Worker:
    """Another process that decomposes the weights of a file, and stops in the midst of number 0 and number 8."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def read(self) -> list[str]:
        assert select.select([self.process.stdout], [], [], 120)[0], "the other process says nothing"
        return self.process.stdout.readline().decode().split()

    def go_on(self) -> None:
        self.process.stdin.write(b"\n")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_two_processes_decompose_each_weight_once_and_a_killed_one_leaves_no_lock(
    tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = threading.Event()

    class Lock(FileLock):
        def acquire(self, *args: object, **kwargs: object) -> object:
            waiting.set()
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(lock_module, "FileLock", Lock)
    weights, bases = [torch.randn(20 + i, 30) for i in range(9)], BasisCache()
    torch.save(weights, tmp_path / "weights.pt")
    worker = Worker(tmp_path / "weights.pt")
    mine: list[str] = []

    def load(numbers: range) -> threading.Thread:
        def run() -> None:
            mine.extend(weight_key(bases.load_or_compute(weights[i], name=str(i)).vectors) for i in numbers)

        thread = threading.Thread(target=run, daemon=True)  # a lock that never opens must not hold up the tests
        thread.start()
        return thread

    try:
        # the other one is at work on the first weight when this one comes to its lock
        assert worker.read() == ["computing", "0"]
        thread = load(range(8))
        assert waiting.wait(60)
        worker.go_on()
        thread.join(60)
        said = [["computing", "0"]]
        while said[-1] != ["computing", "8"]:
            said.append(worker.read())
    finally:
        worker.kill()
    theirs = [what for verb, what in said[:-1] if verb == "computing"]
    assert sorted(computed + theirs) == [str(i) for i in range(8)]
    assert mine == [what for verb, what in said if verb == "has"]

    computed.clear()
    thread = load(range(8, 9))
    thread.join(60)
    assert not thread.is_alive()
    assert computed == ["8"]
    assert len(list_cache()) == 9


def test_clearing_leaves_what_is_not_ours(tmp_path: Path) -> None:
    """Such as when the folder holds models, too."""
    BasisCache(tmp_path).load_or_compute(torch.randn(3, 4))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.tmp").write_text("mine")
    clear_cache(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["model.safetensors", "notes.tmp"]
