"""The command line `hitsr-fast COMMAND ...`: a command is a dataclass of arguments with `run() -> int`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Annotated

import tyro

from hitsr_fast.cli.eval import Eval
from hitsr_fast.cli.info import Info
from hitsr_fast.cli.photos import Photos
from hitsr_fast.cli.train import Train
from hitsr_fast.cli.upscale import Upscale
from hitsr_fast.cli.weights import Weights

Command = (
    Annotated[Upscale, tyro.conf.subcommand("upscale")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Weights, tyro.conf.subcommand("weights")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Photos, tyro.conf.subcommand("photos")]
    | Annotated[Train, tyro.conf.subcommand("train")]
)


def main(args: list[str] | None = None) -> None:
    """Parse the command line, run the command and exit with its code; 130 if interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be valid in the locale's encoding
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdout else "backslashreplace")
    try:
        code = _parse(args).run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _parse(args: list[str] | None) -> Command:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command: Command = tyro.cli(
                Command,
                prog="hitsr-fast",
                description="Image super-resolution by next-scale prediction.",
                args=args,
            )
    except (ValueError, SystemExit) as error:
        fault = _config_fault(error)
        if fault is None:
            sys.stderr.write(said.getvalue())
            raise
        print(f"hitsr-fast: {fault}", file=sys.stderr)
        sys.exit(2)
    return command


def _config_fault(error: BaseException) -> str | None:
    """What a configuration says of a value that it does not take, and where in the recipe it is; or None.

    tyro draws a box and exits while it handles an error of its own, raised while it handled the
    configuration's; the attribute `arg` tells where the configuration is, or which option could not be read.
    """
    where: object = ""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ValueError):
        where, cause = getattr(cause, "arg", where), cause.__context__
    if cause is None or not isinstance(where, str):
        return None
    place = where.rpartition("recipe.")[2].replace("-", "_")
    return f"{place}.{cause}" if place else str(cause)
