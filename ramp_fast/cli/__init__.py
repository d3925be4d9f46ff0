"""The ``ramp-fast`` command: ``attribute`` makes relevance maps of photographs, ``evaluate`` measures methods, ``run``
attributes whole data sets, ``verify`` looks at what that has stored, ``report`` makes a page of it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ramp_fast.cli import attribute, evaluate, report, run, verify
from ramp_fast.cli.common import FAILED, INTERRUPTED, complain, reason, silence
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
    _keep_standard_descriptors()
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the reason, or the help
        return int(stop.code or 0)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        complain(f"interrupted; {arguments.kept}")
        return INTERRUPTED
    except BrokenPipeError:  # of a progress bar
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                silence(stream)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ramp-fast", description="Fast absLRP attributions for image classifiers.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    attribute.add_command(commands)
    evaluate.add_command(commands)
    run.add_command(commands)
    verify.add_command(commands)
    report.add_command(commands)
    return parser


def _keep_standard_descriptors() -> None:
    """Where standard input, output or error are closed, have nothing in their place.

    Otherwise the next file that is opened takes the number, and libraries write their warnings into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
