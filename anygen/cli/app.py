"""The command line's door. It imports nothing heavy before a command needs it, so that `--help` answers at once.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 and 143 interrupted after a clean save.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from anygen._version import __version__
from anygen.cli import benching, exporting, measuring, recipes, sampling, training
from tokenizers_mm.errors import AnyGenError

app = typer.Typer(
    name="anygen",
    help="One causal transformer in which text, pictures and sound are all tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    sampling.generate,
    training.train,
    training.run,
    exporting.export,
    sampling.gallery,
    measuring.evaluate,
    sampling.tokenize,
    measuring.plot,
    measuring.inspect,
    measuring.doctor,
):
    app.command()(_command)
app.add_typer(recipes.app, name="recipes")
app.add_typer(benching.app, name="bench")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every expected fault is one sentence on stderr."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("anygen").setLevel(logging.INFO)
    try:
        app(args=arguments, standalone_mode=True)
    except (AnyGenError, OSError) as error:
        _leave(error)
    except SystemExit as leaving:
        if leaving.code == 130:  # typer turned Ctrl-C into it
            print("Interrupted.", file=sys.stderr)
        raise


def _leave(error: AnyGenError | OSError) -> None:
    if isinstance(error, OSError) and not isinstance(error, AnyGenError):  # a full disk, a folder without permission
        name = f": {error.filename}" if error.filename else ""
        print(f"Error: {error.strerror or error}{name}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"Error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code if isinstance(error, AnyGenError) else 1) from None


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit
