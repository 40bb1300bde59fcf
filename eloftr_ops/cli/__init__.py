# SPDX-License-Identifier: Apache-2.0
"""The command line, ``eloftr-ops``: one module per group of commands.

Exit codes: 0 done, no match found included; 2 bad usage or input, with one line that says what to do; 130
interrupted; 1 anything else.
"""

from __future__ import annotations

from typing import Annotated

import typer

from eloftr_ops._version import __version__
from eloftr_ops.cli.app import app_command
from eloftr_ops.cli.calibrate import calibrate
from eloftr_ops.cli.evaluate import evaluate
from eloftr_ops.cli.export import export
from eloftr_ops.cli.export_matches import export_matches
from eloftr_ops.cli.match_pairs import match_pairs_command
from eloftr_ops.cli.matching import demo, match
from eloftr_ops.cli.reconstruct import reconstruct_command
from eloftr_ops.cli.train import train

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut the names of options
    pretty_exceptions_show_locals=False,
    help="EfficientLoFTR: match images, train, evaluate and export matchers.",
)
for command in (match, demo, train, calibrate, evaluate, export):
    app.command()(command)
app.command("export-matches")(export_matches)
app.command("match-pairs")(match_pairs_command)
app.command("reconstruct")(reconstruct_command)
app.command("app")(app_command)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """EfficientLoFTR: match images, train, evaluate and export matchers."""
    if version:
        typer.echo(f"eloftr-ops {__version__}")
        raise typer.Exit
