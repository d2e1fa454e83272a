"""The command line `hitsr-fast COMMAND ...`: a command is a dataclass of arguments with `run() -> int`."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import replace
from typing import Annotated

import tyro

from hitsr_fast.cli.crops import Crops
from hitsr_fast.cli.data import Data
from hitsr_fast.cli.eval import Eval
from hitsr_fast.cli.eval_tokenizer import EvalTokenizer
from hitsr_fast.cli.info import Info
from hitsr_fast.cli.pairs import Pairs
from hitsr_fast.cli.photos import Photos
from hitsr_fast.cli.train import Train, split
from hitsr_fast.cli.upscale import Upscale
from hitsr_fast.cli.weights import Weights

Command = (
    Annotated[Upscale, tyro.conf.subcommand("upscale")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[EvalTokenizer, tyro.conf.subcommand("eval-tokenizer")]
    | Annotated[Pairs, tyro.conf.subcommand("pairs")]
    | Annotated[Weights, tyro.conf.subcommand("weights")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Photos, tyro.conf.subcommand("photos")]
    | Annotated[Crops, tyro.conf.subcommand("crops")]
    | Annotated[Data, tyro.conf.subcommand("data")]
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
    args, overrides = sys.argv[1:] if args is None else args, tuple[str, ...]()
    if args[:1] == ["train"]:  # whose recipe says which further options there are
        args, overrides = split(args)
    command: Command = tyro.cli(
        Command,
        prog="hitsr-fast",
        description="Image super-resolution by next-scale prediction.",
        args=args,
    )
    return replace(command, overrides=overrides) if isinstance(command, Train) else command
