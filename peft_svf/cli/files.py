"""The commands on files: inspect, export, push, decompose, import and the cache."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Column, Table

from .choices import PARAMETRIZATIONS, one_of
from .errors import in_a_line, warnings_in_a_line
from .options import CheckOption, DtypeOption, JsonOption, check_device, check_dtype
from .output import ADAPTER, MODEL, PACK, OverwriteOption, check_output, emptied

if TYPE_CHECKING:
    from peft import PeftModel

files = typer.Typer(no_args_is_help=True)
export = typer.Typer(no_args_is_help=True, help="Write an expert in a format of other libraries.")
cache = typer.Typer(no_args_is_help=True, help="The cache of singular bases.")
files.add_typer(export, name="export")
files.add_typer(cache, name="cache")

BaseOption = Annotated[
    Optional[str],
    typer.Option("--model_name_or_path", help="The base model. Default: the one in the adapter's config."),
]
AdapterArgument = Annotated[str, typer.Argument(help="Folder or Hub id of an SVF adapter.")]
OutputOption = Annotated[Path, typer.Option("--output_dir", help="The folder to write.")]
CacheOption = Annotated[Optional[Path], typer.Option("--cache_dir", help="Default: $PEFT_SVF_CACHE.")]


@files.command("inspect")
def inspect_command(
    adapter: AdapterArgument,
    count: Annotated[int, typer.Option("--count", help="Number of largest changes to list.", min=0)] = 5,
    plot: Annotated[Optional[Path], typer.Option("--plot", help="Image file for a plot of δ.")] = None,
    model_name_or_path: Annotated[
        Optional[str], typer.Option("--model_name_or_path", help="A model to compare with the adapter's base model.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what an adapter contains. With a model, check that it fits.

    The exit status is 1 if the adapter is broken or does not fit the model.

    peft-svf inspect experts/math --plot math.png --model_name_or_path MODEL
    """
    with in_a_line():
        from ..interop.inspect import adapted_part, check_spectrum, inspect_adapter

        summary, deltas = inspect_adapter(adapter, count=count)
        fraction = adapted_part(model_name_or_path or summary.base_model, deltas, revision=summary.revision)
        different = None if model_name_or_path is None else check_spectrum(adapter, model_name_or_path)
        if plot is not None:
            from ..reporting.plots import plot_deltas

            plot_deltas(deltas, plot, title=Path(adapter).name)
    wrong = bool(different or summary.broken or summary.problem)
    if as_json:
        print(json.dumps({**summary.to_dict(), "adapted_fraction": fraction, "different": different}, indent=1))
        raise typer.Exit(int(wrong))
    table = Table(show_header=False, box=None)
    revision = f" ({summary.revision})" if summary.revision else ""
    table.add_row("base model", f"{summary.base_model}{revision}")
    table.add_row("weights", f"{summary.modules}, {summary.fingerprinted} with a recorded spectrum")
    if fraction is not None:
        table.add_row("adapted", f"{fraction:.1%} of the linear weights (without the output layer)")
    table.add_row("parameters", f"{summary.numbers:,} (r = {summary.r or 'full'})")
    table.add_row("rms of δ", f"{summary.rms:.4g}")
    for i, (name, size) in enumerate(summary.largest.items()):
        table.add_row("largest" if i == 0 else "", f"{name}: {size:.4g}")
    if different is not None:
        first = next(iter(different.items()), ("", ""))
        words = f"{len(different)} of {summary.fingerprinted} weights differ, the first is {first[0]}: {first[1]}"
        table.add_row("spectrum", words if different else f"equal to that of {model_name_or_path}")
    if summary.broken:
        table.add_row("NaN or Inf in", ", ".join(summary.broken))
    if summary.missing:
        table.add_row("no δ for", ", ".join(summary.missing))
    if summary.problem:
        table.add_row("does not load", summary.problem)
    if summary.more:
        table.add_row("other tensors", ", ".join(summary.more))
    Console().print(table)
    raise typer.Exit(int(wrong))


@export.command()
def lora(
    adapter: AdapterArgument,
    output_dir: OutputOption,
    model_name_or_path: BaseOption = None,
    rank: Annotated[Optional[int], typer.Option("--rank", help="Largest rank of a module.")] = None,
    energy: Annotated[
        Optional[float],
        typer.Option("--energy", help="Choose the rank of each module that keeps this fraction of the change."),
    ] = None,
    dtype: DtypeOption = "auto",
    base_check: CheckOption = "error",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an expert as a LoRA adapter: exact, or the best approximation of a lower rank.

    peft-svf export lora experts/math --rank 64 --output_dir math-lora
    """
    with in_a_line():
        check_output(output_dir, ADAPTER, overwrite)
        from ..interop.lora import to_lora

        found = to_lora(_loaded(adapter, model_name_or_path, dtype, base_check), rank=rank, energy=energy)
        found.save_pretrained(output_dir)
    if as_json:
        print(json.dumps({"rank": found.rank, "retained": found.retained_overall, "folder": str(output_dir)}))
    else:
        print(f"rank {found.rank}, {found.retained_overall:.1%} of the change; saved in {output_dir}")


@export.command()
def merged(
    adapter: AdapterArgument,
    output_dir: OutputOption,
    model_name_or_path: BaseOption = None,
    revision: Annotated[
        Optional[str], typer.Option("--revision", help="Revision of the base model on the Hub.")
    ] = None,
    base_check: CheckOption = "error",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an expert and its base model as one model, file by file.

    peft-svf export merged experts/math --output_dir math-model
    """
    with in_a_line(), warnings_in_a_line():
        check_output(output_dir, MODEL, overwrite)
        from ..interop.merged import merge_to_folder
        from ..tuner.config import load_svf_config

        base = model_name_or_path or load_svf_config(adapter).base_model_name_or_path
        if base and Path(base).resolve() == output_dir.resolve():
            raise ValueError(f"--output_dir {output_dir} is the folder of the base model. Pass another folder.")
        with emptied(output_dir, overwrite) as folder:
            found = merge_to_folder(adapter, folder, model_name_or_path, revision=revision, base_check=base_check)
    least = min(found.shares.values())
    if as_json:
        print(json.dumps({"folder": str(output_dir), "weights": len(found.shares), "least_share": least}))
    else:
        print(f"{len(found.shares)} weights changed; saved in {output_dir}")


@files.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an SVF adapter.")],
    repo_id: Annotated[str, typer.Argument(help="Such as me/my-expert.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[Optional[str], typer.Option("--revision", help="The branch to push to.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload an expert with its model card to the Hub.

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
    r: Annotated[Optional[int], typer.Option("--r", help="Singular vectors of each weight. Default: all.")] = None,
    target_modules: Annotated[
        Optional[list[str]], typer.Option("--target_modules", help="As in SVFConfig. May be repeated.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the singular vectors: auto, float32, bfloat16, ...")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="The device that computes.")] = "cpu",
    revision: Annotated[Optional[str], typer.Option("--revision", help="Revision of the model on the Hub.")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the singular bases of a model to a pack. It can be shared, serves quantized models, and can be resumed.

    peft-svf decompose MODEL --output_dir MODEL-basis
    """
    with in_a_line():
        check_output(output_dir, PACK, overwrite, resume=_is_pack_of(output_dir, model, r))
        check_dtype(dtype)
        check_device(device)
        import torch

        from ..interop.packs import decompose as decomposed

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
    model_name_or_path: Annotated[
        str, typer.Option("--model_name_or_path", help="The model that the expert was trained on.")
    ],
    output_dir: OutputOption,
    parametrization: Annotated[
        Optional[str],
        typer.Option(
            "--parametrization",
            help="sigmoid, raw or offset. Default: that of the file format.",
            **one_of(PARAMETRIZATIONS),
        ),
    ] = None,
    max_mult: Annotated[float, typer.Option("--max_mult", help="Largest value of the sigmoid.")] = 1.0,
    layer: Annotated[
        Optional[list[int]], typer.Option("--layer", help="A layer of TRINITY's vector. Default: 26.")
    ] = None,
    skip: Annotated[Optional[list[str]], typer.Option("--skip", help="A module to leave out. May be repeated.")] = None,
    dtype: DtypeOption = "auto",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Import an expert of the paper's released code. Also TRINITY's. Only tensors are loaded.

    peft-svf import policy_params.pt --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct --output_dir expert
    """
    with in_a_line(), warnings_in_a_line():
        check_output(output_dir, ADAPTER, overwrite)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        check_dtype(dtype)
        from transformers import AutoModelForCausalLM

        from ..interop.released import import_expert

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
    cache_dir: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the cached singular bases by model, with their size.

    peft-svf cache list
    """
    from ..spectral.cache import list_cache

    with in_a_line():
        entries = list_cache(cache_dir)
    if as_json:
        print(json.dumps([{**asdict(entry), "path": str(entry.path)} for entry in entries], indent=1))
        return
    sizes: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        kind = f"{' x '.join(map(str, entry.shape))}, {entry.dtype}"
        sizes.setdefault((entry.model or "unknown", kind), []).append(entry.size)
    table = Table(Column("model", overflow="fold"), "weights", "number", "MiB")
    for (model, kind), each in sorted(sizes.items()):
        table.add_row(model, kind, str(len(each)), f"{sum(each) / 2**20:.1f}")
    table.add_row("all", "", str(len(entries)), f"{sum(entry.size for entry in entries) / 2**20:.1f}")
    Console().print(table)


@cache.command("clear")
def clear_command(
    cache_dir: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete the cached singular bases. They are computed again when needed.

    peft-svf cache clear
    """
    from ..spectral.cache import clear_cache

    with in_a_line():
        freed = clear_cache(cache_dir)
    print(json.dumps({"freed": freed}) if as_json else f"{freed / 2**20:.1f} MiB freed")


def _is_pack_of(folder: Path, model: str, r: int | None) -> bool:
    """Whether a folder holds a basis pack of this model, which `decompose` verifies and completes."""
    from ..spectral.pack import INDEX, BasisPack

    if not (folder / INDEX).exists():
        return False
    about = BasisPack(folder).about
    return bool(about["base_model"] == model and about["r"] == r)


def _loaded(adapter: str, base: str | None, dtype: str, base_check: str) -> PeftModel:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from ..mixture.loading import expert_config

    config = expert_config("adapter", adapter, base_check)
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError("The adapter's config names no base model. Pass --model_name_or_path.")
    check_dtype(dtype)
    model = AutoModelForCausalLM.from_pretrained(name, revision=None if base else config.revision, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter, config=config)
