"""``ramp-fast report`` makes a folder with a page for a browser from a store of maps."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import TYPE_CHECKING

from ramp_fast.cli.common import OK, complain, count, say_line, shows_bar
from ramp_fast.errors import RampFastError

if TYPE_CHECKING:
    from ramp_fast.data import Source
    from ramp_fast.results import StoredMaps

__all__ = ["add_command"]

MOST_IMAGES = 100_000  # as in ramp_fast.report.writing, which takes longer to import than `--help` may


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``ramp-fast report``."""
    report = commands.add_parser(
        "report",
        help="a page to look at a store of maps",
        description="Make a folder with a page that any browser opens, from the disk or from a web server: overview, "
        "classes with their mean maps, a gallery to search and sort, a random sample. Nothing in the store is changed.",
    )
    report.add_argument("store", metavar="STORE", help="folder that `ramp-fast run` has written")
    report.add_argument("--out", required=True, metavar="DIR", help="folder of the report; an earlier one is replaced")
    report.add_argument(
        "--images",
        type=count(1, MOST_IMAGES),
        default=5000,
        metavar="N",
        help="images of the gallery; of more a random sample is taken (default: 5000)",
    )
    report.add_argument("--seed", type=count(0), default=0, metavar="S", help="of the sample (default: 0)")
    report.add_argument("--source", metavar="SOURCE", help="where the images lie now (default: where they lay)")
    report.add_argument(
        "--photographs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show photographs below the maps (default), or maps alone",
    )
    report.add_argument(
        "--workers", type=count(0, 256), default=0, metavar="N", help="processes that decode (default: none but this)"
    )
    report.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None, help="progress bar (default: on a terminal)"
    )
    report.add_argument("--debug", action="store_true", help="show the traceback of an error")
    report.set_defaults(run=_report, kept="an earlier report is as it was")


def _report(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ramp_fast.report import Photographs, check_target, write_report
    from ramp_fast.report.writing import BLOCK
    from ramp_fast.results import open_maps

    store = open_maps(arguments.store)
    check_target(arguments.out)
    with warnings.catch_warnings():
        # Pillow warns of large images and odd metadata; what cannot be read the page says.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        source, problem = _source(arguments, store)

        def photographs() -> Photographs:
            assert source is not None
            return Photographs(store.plan, source, BLOCK, arguments.workers)

        bar = tqdm(
            total=len(store), unit="image", file=sys.stderr, dynamic_ncols=True, disable=not shows_bar(arguments)
        )
        with bar:
            summary = write_report(
                store,
                arguments.out,
                images=arguments.images,
                seed=arguments.seed,
                photographs=None if source is None else photographs,
                no_photographs=problem,
                progress=lambda done: bar.update(done - bar.n),
            )
    gallery = summary["gallery"]
    if gallery["problem"] and arguments.photographs:
        complain(gallery["problem"])
    page = os.path.join(arguments.out, "index.html")
    say_line(f"{page}: {summary['counts']['done']} images, {gallery['count']} in the gallery", sys.stdout)
    return OK


def _source(arguments: argparse.Namespace, store: StoredMaps) -> tuple[Source | None, str]:
    """The source of the photographs, or why there is none."""
    from ramp_fast.pipeline.planning import check_source, source_of

    if not arguments.photographs:
        return None, "The report was made without photographs (--no-photographs)."
    path = arguments.source or store.plan.request.get("paths", {}).get("source")
    try:
        if path is None:
            raise RampFastError("the store does not say where its images lie")
        source = source_of(store.plan.request, path)
        check_source(store.plan, store.images, source, arguments.store)
    except RampFastError as error:
        if arguments.source is not None:
            raise
        return None, f"Maps alone, for the images cannot be read: {error}. --source says where they lie now."
    return source, ""
