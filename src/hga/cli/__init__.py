"""The command `hga`. Commands import torch and transformers only when they run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from hga import __version__
from hga.cli import chat, demo, evaluate, generate, models, plan, serve
from hga.cli import context as contexts

app = typer.Typer(name="hga", add_completion=False, rich_markup_mode=None, invoke_without_command=True)
app.command("chat")(chat.chat)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("plan")(plan.plan)
app.command("serve")(serve.serve)
app.add_typer(contexts.app, name="context")
app.add_typer(evaluate.app, name="eval")
app.add_typer(models.app, name="models")

# typer carries its own copy of click in newer versions: the class is taken from what typer exports.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


@app.callback()
def hga(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """A pretrained transformer reads far more context than its GPU can hold.

    Start with: hga demo
    """
    if show_version:
        print(f"hga {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 after one line on stderr for bad input, 130 when interrupted."""
    command = typer.main.get_command(app)
    try:
        status = command.main(None if arguments is None else list(arguments), prog_name="hga", standalone_mode=False)
    except _USAGE_ERROR as error:
        return _complain(error.format_message())  # type: ignore[attr-defined]
    except (ValueError, OSError, MemoryError) as error:
        return _complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return status if isinstance(status, int) else 0


def _complain(cause: str) -> int:
    print(f"hga: {' '.join(cause.split())}", file=sys.stderr)
    return 2
