"""`hga plan`: does it fit, from the config alone."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from hga.cli.options import Budget, Json, Preset, RamCache, Store, routing
from hga.cli.output import console, emit, in_bytes, messages, say, table

if TYPE_CHECKING:
    from hga.plan import Plan

_ON_GPU = {
    "weight_bytes": "weights",
    "summary_bytes": "summaries",
    "window_bytes": "sink, window, unclosed tokens",
    "other_cache_bytes": "layers that are not routed",
    "working_bytes": "working set: a layer's K/V staged, or groups cached for decoding",
    "buffer_bytes": "activations and scores (estimate)",
    "runtime_bytes": "CUDA context (assumed)",
}


def plan(
    context: Annotated[int, typer.Option("--context", metavar="N", help="Tokens to read and write.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="M",
            help="A bundled config (Qwen3-30B-A3B, smollm2-135m), a config file, a folder or a hub id.",
        ),
    ],
    gpu_gb: Annotated[
        float | None,
        typer.Option("--gpu-gb", metavar="G", help="Memory of the GPU in GiB, to say what fits."),
    ] = None,
    preset: Preset = "balanced",
    budget: Budget = None,
    store: Store = "ram",
    ram_cache_gb: RamCache = None,
    weight_bits: Annotated[
        float | None,
        typer.Option("--weight-bits", metavar="B", help="Width of quantised weight matrices, e.g. 8 or 4.5."),
    ] = None,
    json: Json = False,
) -> None:
    """Say what a model and a context need, with HGA and with dense K/V. No weights are loaded.

    Example: hga plan --model Qwen3-30B-A3B --context 262144 --gpu-gb 40 --weight-bits 8
    """
    config = routing(preset, budget, ram_cache_gb, store=store)
    with messages.status("counting ..."):
        from hga.plan import GIB, find_config
        from hga.plan import plan as make_plan

        gpu_bytes = None if gpu_gb is None else int(gpu_gb * GIB)
        made = make_plan(find_config(model), config, context, gpu_bytes=gpu_bytes, weight_bits=weight_bits)
    if json:
        emit({"model": model, "preset": preset, "budget_tokens": config.budget_tokens} | made.row())
    else:
        _show(model, made, f"{preset}, {config.budget_tokens:,} exact tokens a query")
    if made.max_position_embeddings is not None and context > made.max_position_embeddings:
        say(
            f"Note: {context:,} tokens are beyond the model's {made.max_position_embeddings:,} positions; "
            "reading them needs --rope-scaling, and fidelity beyond the trained length is the model's own."
        )


def _show(model: str, plan: Plan, rule: str) -> None:
    console.print(f"{model}, {plan.context:,} tokens, {plan.kv_dtype} K/V; {rule}", style="bold")
    with_hga = table("with HGA, on the GPU", "needs")
    for field, name in _ON_GPU.items():
        with_hga.add_row(name, in_bytes(getattr(plan, field)))
    with_hga.add_section()
    with_hga.add_row("peak GPU memory", in_bytes(plan.peak_bytes), style="bold")
    if plan.store == "device":
        with_hga.add_row("of it, the archive", in_bytes(plan.store_bytes))
    else:
        with_hga.add_row("in host memory, not on the GPU", in_bytes(plan.host_bytes))
    if plan.nvme_bytes:
        with_hga.add_row("in the scratch file", in_bytes(plan.nvme_bytes))
    console.print(with_hga)
    console.print(f"Routed: layers {_ranges(plan.routed_layers)} of {plan.layers}.")

    dense = table("without HGA: dense K/V on the GPU", "needs", "fits")
    for name, needs, fits in (
        ("16 bits", plan.dense_kv_bytes, plan.dense_fits),
        ("8 bits", plan.dense_kv_8bit_bytes, plan.dense_8bit_fits),
        ("4 bits", plan.dense_kv_4bit_bytes, plan.dense_4bit_fits),
    ):
        dense.add_row(name, in_bytes(needs), "?" if fits is None else "yes" if fits else "no")
    console.print(dense)
    for line in _verdict(plan):
        console.print(line, style="bold")


def _verdict(plan: Plan) -> list[str]:
    if plan.gpu_bytes is None or plan.longest_context is None:
        return ["Give --gpu-gb to see what fits."]
    gpu, peak = in_bytes(plan.gpu_bytes), in_bytes(plan.peak_bytes)
    lines = []
    if plan.dense_fits:
        lines.append(f"Dense 16-bit K/V fits in {gpu}: you do not need HGA for this.")
    lines.append(f"With HGA it {'fits' if plan.fits else 'does not fit'} in {gpu}: {peak} at the peak.")
    if plan.longest_context:
        lines.append(f"The longest context that fits with HGA: {plan.longest_context:,} tokens.")
    elif plan.weight_bytes > plan.gpu_bytes:
        lines.append(f"The weights alone take {in_bytes(plan.weight_bytes)}; see --weight-bits for quantised ones.")
    else:
        lines.append("No context fits beside the weights.")
    return lines


def _ranges(indices: Iterable[int]) -> str:
    """0-3, 7: runs of consecutive indices."""
    runs = []
    for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        members = [index for _, index in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(runs)
