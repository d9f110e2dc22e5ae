"""The commands on adapters as files: what is in them, and other formats."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from .errors import in_a_line

if TYPE_CHECKING:
    from peft import PeftModel

files = typer.Typer(no_args_is_help=True)
export = typer.Typer(no_args_is_help=True, help="Write an expert in a form that needs no peft-svf.")
cache = typer.Typer(no_args_is_help=True, help="The singular bases of the models that were used.")
files.add_typer(export, name="export")
files.add_typer(cache, name="cache")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BaseOption = Annotated[
    Optional[str], typer.Option("--model_name_or_path", help="The base model (default: that of the adapter's config).")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Of the base model: auto, float32, bfloat16, ...")]
CheckOption = Annotated[
    str, typer.Option("--base_check", help="error, warn or ignore, if the adapter is for another base model.")
]
OutputOption = Annotated[Path, typer.Option("--output_dir", help="Where to write.")]


@files.command("inspect")
def inspect_command(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of an SVF adapter.")],
    count: Annotated[int, typer.Option("--count", help="How many of the largest changes to name.", min=0)] = 5,
    plot: Annotated[
        Optional[Path], typer.Option("--plot", help="An image of δ by layer and module, and by size.")
    ] = None,
    model_name_or_path: Annotated[
        Optional[str], typer.Option("--model_name_or_path", help="A model to compare with the one it was made for.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is in an adapter: base model, size, largest changes. With a model, whether it is for that.

    peft-svf inspect experts/math --plot math.png --model_name_or_path MODEL
    """
    with in_a_line():
        from ..interop.inspect import check_spectrum, inspect_adapter

        summary, deltas = inspect_adapter(adapter, count=count)
        different = None if model_name_or_path is None else check_spectrum(adapter, model_name_or_path)
        if plot is not None:
            from ..reporting.plots import plot_deltas

            plot_deltas(deltas, plot, title=Path(adapter).name)
    if as_json:
        print(json.dumps({**summary.to_dict(), "different": different}, indent=1))
        return
    table = Table(show_header=False, box=None)
    revision = f" ({summary.revision})" if summary.revision else ""
    table.add_row("base model", f"{summary.base_model}{revision}")
    table.add_row("weights", f"{summary.modules}, of which {summary.fingerprinted} have their spectrum recorded")
    table.add_row("numbers", f"{summary.numbers:,} (r = {summary.r or 'all'})")
    table.add_row("rms of δ", f"{summary.rms:.4g}")
    for i, (name, size) in enumerate(summary.largest.items()):
        table.add_row("largest" if i == 0 else "", f"{name}: {size:.4g}")
    if different is not None:
        first = next(iter(different.items()), ("", ""))
        words = f"{len(different)} of {summary.fingerprinted} weights differ, the first is {first[0]}: {first[1]}"
        table.add_row("spectrum", words if different else f"that of {model_name_or_path}")
    if summary.broken:
        table.add_row("NaN or Inf in", ", ".join(summary.broken))
    if summary.more:
        table.add_row("besides δ", ", ".join(summary.more))
    Console().print(table)


@export.command()
def lora(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of an SVF adapter.")],
    output_dir: OutputOption,
    model_name_or_path: BaseOption = None,
    rank: Annotated[Optional[int], typer.Option("--rank", help="At most so many terms in each module.")] = None,
    energy: Annotated[
        Optional[float], typer.Option("--energy", help="As many terms as hold this share of the change.")
    ] = None,
    dtype: DtypeOption = "auto",
    base_check: CheckOption = "error",
    as_json: JsonOption = False,
) -> None:
    """As a LoRA adapter: exact, or the closest of a lower rank.

    peft-svf export lora experts/math --rank 64 --output_dir math-lora
    """
    with in_a_line():
        from ..interop.lora import to_lora

        found = to_lora(_loaded(adapter, model_name_or_path, dtype, base_check), rank=rank, energy=energy)
        found.save_pretrained(output_dir)
    if as_json:
        print(json.dumps({"rank": found.rank, "retained": found.retained_overall, "folder": str(output_dir)}))
    else:
        print(f"rank {found.rank}, {found.retained_overall:.1%} of the change; saved in {output_dir}")


@export.command()
def merged(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of an SVF adapter.")],
    output_dir: OutputOption,
    model_name_or_path: BaseOption = None,
    revision: Annotated[Optional[str], typer.Option("--revision", help="Of the base model on the Hub.")] = None,
    base_check: CheckOption = "error",
    as_json: JsonOption = False,
) -> None:
    """As a whole model, written file by file.

    peft-svf export merged experts/math --output_dir math-model
    """
    with in_a_line(), _warnings_in_a_line():
        from ..interop.merged import merge_to_folder

        found = merge_to_folder(
            adapter, output_dir, model_name_or_path, revision=revision, base_check=_check(base_check)
        )
    least = min(found.shares.values())
    if as_json:
        print(json.dumps({"folder": str(found.folder), "weights": len(found.shares), "least_share": least}))
    else:
        print(f"{len(found.shares)} weights changed; saved in {found.folder}")


@files.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an SVF adapter.")],
    repo_id: Annotated[str, typer.Argument(help="Such as me/my-expert.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is new.")] = False,
    revision: Annotated[Optional[str], typer.Option("--revision", help="A branch.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload an expert to the Hub, with its card, plots and numbers.

    peft-svf push experts/math me/math-expert
    """
    with in_a_line():
        from ..interop.hub import push_expert

        url = push_expert(folder, repo_id, private=private or None, revision=revision)
    print(json.dumps({"url": url}) if as_json else url)


@files.command()
def decompose(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the full-precision model.")],
    output_dir: OutputOption,
    r: Annotated[Optional[int], typer.Option("--r", help="Singular vectors of each weight; all by default.")] = None,
    target_modules: Annotated[
        Optional[list[str]], typer.Option("--target_modules", help="As in SVFConfig; may be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the vectors: auto, float32, bfloat16, ...")] = "auto",
    device: Annotated[str, typer.Option("--device", help="Where to compute.")] = "cpu",
    revision: Annotated[Optional[str], typer.Option("--revision", help="Of the model on the Hub.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the singular bases of a model, to be shared, and for its quantized forms. Goes on where it was stopped.

    peft-svf decompose MODEL --output_dir MODEL-basis
    """
    with in_a_line():
        import torch

        from ..interop.packs import decompose as decomposed

        _check_dtype(dtype)
        kind = None if dtype == "auto" else getattr(torch, dtype)
        targets: Any = target_modules or "all-linear"
        pack = decomposed(
            model, output_dir, target_modules=targets[0] if targets == ["all-linear"] else targets, r=r, dtype=kind,
            device=device, revision=revision,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"folder": str(output_dir), "weights": len(pack.modules), "size": pack.about["total_size"]}))
    else:
        print(f"{len(pack.modules)} weights decomposed; saved in {output_dir}")


@files.command("import")
def import_command(
    path: Annotated[Path, typer.Argument(help="A file of the paper's released code, or TRINITY's vector.")],
    model_name_or_path: Annotated[str, typer.Option("--model_name_or_path", help="The model it was trained on.")],
    output_dir: OutputOption,
    parametrization: Annotated[
        Optional[str],
        typer.Option("--parametrization", help="sigmoid, raw or offset (default: as such files are written)."),
    ] = None,
    max_mult: Annotated[float, typer.Option("--max_mult", help="The largest mask of the sigmoid.")] = 1.0,
    layer: Annotated[
        Optional[list[int]], typer.Option("--layer", help="A layer that a single vector is for (default: 26).")
    ] = None,
    skip: Annotated[Optional[list[str]], typer.Option("--skip", help="A module to leave out.")] = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """An expert of the paper's released code, or TRINITY's, as an SVF adapter. Only tensors are ever loaded.

    peft-svf import policy_params.pt --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct --output_dir expert
    """
    with in_a_line(), _warnings_in_a_line():
        from transformers import AutoModelForCausalLM

        from ..interop.released import import_expert

        if (output_dir / "adapter_config.json").exists():
            raise ValueError(f"{output_dir} holds an adapter. Write to another folder.")
        _check_dtype(dtype)

        options: dict[str, Any] = {"parametrization": parametrization, "max_mult": max_mult, "skip": skip or []}
        if layer:
            options["layers"] = layer
        base = AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype=dtype)
        model = import_expert(path, base, **options)
        model.peft_config["default"].base_model_name_or_path = model_name_or_path
        model.save_pretrained(str(output_dir))
    if as_json:
        changed = sum(parameter.numel() for name, parameter in model.named_parameters() if "svf_delta" in name)
        print(json.dumps({"folder": str(output_dir), "numbers": changed}))
    else:
        print(f"saved in {output_dir}")


@cache.command("list")
def list_command(
    cache_dir: Annotated[Optional[Path], typer.Option("--cache_dir", help="Default: $PEFT_SVF_CACHE.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What is kept, and how large it is.

    peft-svf cache list
    """
    from ..spectral.cache import list_cache

    with in_a_line():
        entries = list_cache(cache_dir)
    if as_json:
        rows = [
            {"key": e.key, "path": str(e.path), "shape": e.shape, "dtype": e.dtype, "size": e.size} for e in entries
        ]
        print(json.dumps(rows, indent=1))
        return
    sizes: dict[str, list[int]] = {}
    for entry in entries:
        sizes.setdefault(f"{' x '.join(map(str, entry.shape))}, {entry.dtype}", []).append(entry.size)
    table = Table("weights", "number", "MiB")
    for kind, each in sorted(sizes.items()):
        table.add_row(kind, str(len(each)), f"{sum(each) / 2**20:.1f}")
    table.add_row("all", str(len(entries)), f"{sum(entry.size for entry in entries) / 2**20:.1f}")
    Console().print(table)


@cache.command("clear")
def clear_command(
    cache_dir: Annotated[Optional[Path], typer.Option("--cache_dir", help="Default: $PEFT_SVF_CACHE.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Delete all that is kept. It is computed again when it is needed.

    peft-svf cache clear
    """
    from ..spectral.cache import clear_cache

    with in_a_line():
        freed = clear_cache(cache_dir)
    print(json.dumps({"freed": freed}) if as_json else f"{freed / 2**20:.1f} MiB freed")


def _loaded(adapter: str, base: str | None, dtype: str, base_check: str) -> PeftModel:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from ..mixture.loading import expert_config

    config = expert_config("adapter", adapter, _check(base_check))
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError("Which base model? The adapter does not say; pass --model_name_or_path.")
    _check_dtype(dtype)
    model = AutoModelForCausalLM.from_pretrained(name, revision=None if base else config.revision, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter, config=config)


def _check_dtype(dtype: str) -> None:
    import torch

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype must be auto or a torch dtype such as float32, got {dtype!r}.")


def _check(base_check: str) -> Any:
    if base_check not in ("error", "warn", "ignore"):
        raise ValueError(f"--base_check must be error, warn or ignore, got {base_check!r}.")
    return base_check


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in found:
        if issubclass(warning.category, UserWarning):
            print(f"Warning: {warning.message}", file=sys.stderr)
