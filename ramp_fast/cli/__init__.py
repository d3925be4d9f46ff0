"""The ``ramp-fast`` command: ``attribute`` makes relevance maps of photographs, ``evaluate`` measures methods."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ramp_fast.cli import attribute, evaluate
from ramp_fast.cli.common import FAILED, INTERRUPTED, complain, reason
from ramp_fast.errors import RampFastError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        0 when all was done, 2 when anything failed, 130 when interrupted.
    """
    parser = argparse.ArgumentParser(prog="ramp-fast", description="Fast absLRP attributions for image classifiers.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    attribute.add_command(commands)
    evaluate.add_command(commands)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed the reason, or the help
        return int(stop.code or 0)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        complain(f"interrupted; {arguments.kept}")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; without this the interpreter complains again on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except RampFastError as error:
        if arguments.debug:
            raise
        complain(str(error))
        return FAILED
    except Exception as error:
        if arguments.debug:
            raise
        complain(f"{reason(error)} (--debug shows where)")
        return FAILED
