"""``ramp-fast run --ray``: the shards of a run on the machines of a Ray cluster.

Ray starts the workers and hands out numbers of shards, no more: what is finished is what the journals in the store say,
so that a worker or a machine may be lost at any moment. Store, images and weights lie where every machine sees them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ramp_fast.errors import RampFastError
from ramp_fast.results.maps import open_maps, read_journals

__all__ = ["run_on_ray"]

CORES = 8
"""Of a worker, where there are no GPUs."""

POLL = 1.0
"""Seconds between two looks at the journals."""

ROUNDS = 3
"""How often in a row all workers may be lost before one of them has finished a shard."""


class Queue:
    """Numbers of shards, each given once."""

    def __init__(self, shards: Sequence[int]) -> None:
        self._left = list(shards)[::-1]

    def take(self) -> int | None:
        """The next one; None where none is left."""
        return self._left.pop() if self._left else None


def run_on_ray(
    arguments: argparse.Namespace,
    shards: Sequence[int],
    attribute: Callable[[argparse.Namespace, tuple[int, int], Iterator[int]], None],
    progress: Callable[[int], None],
) -> None:
    """Attribute shards on a cluster.

    Parameters
    ----------
    arguments : argparse.Namespace
        Of the command; ``ray`` is the cluster's address, "local" for one on this machine.
    shards : sequence of int
    attribute : callable
        Does what a worker does: arguments, which part of how many it is, and shards as it is given them.
    progress : callable
        Told how many of the shards are finished.

    Raises
    ------
    RampFastError
        Ray is not installed or cannot be reached, or workers fail.
    """
    try:
        import ray
    except ImportError as error:
        raise RampFastError("--ray needs Ray: pip install 'ramp_fast[ray]'") from error
    address = None if arguments.ray == "local" else arguments.ray
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
    except Exception as error:  # of a connection, almost anything
        raise RampFastError(f"cannot reach the Ray cluster {arguments.ray}: {error}") from error
    try:
        left, in_vain = list(shards), 0
        while in_vain < ROUNDS:
            failure = _round(ray, arguments, left, attribute, partial(_told, progress, len(shards) - len(left)))
            finished = open_maps(arguments.out).finished()
            before, left = left, [shard for shard in left if shard not in finished]
            if not left:
                return
            in_vain = in_vain + 1 if len(left) == len(before) else 0
            if in_vain and failure is not None:
                break  # no use in trying once more
        raise RampFastError(f"workers on Ray ended before {len(left)} shards were finished: {failure or 'lost'}")
    finally:
        ray.shutdown()


def _round(
    ray: Any,
    arguments: argparse.Namespace,
    shards: Sequence[int],
    attribute: Callable[[argparse.Namespace, tuple[int, int], Iterator[int]], None],
    progress: Callable[[int], None],
) -> str | None:
    """Hand out shards until workers have ended; why one of them failed, unless they were lost."""
    resources = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    count = max(1, min(gpus or cores // CORES, len(shards)))
    options: dict[str, Any] = {"num_cpus": max(1, cores // (gpus or max(1, cores // CORES))), "max_retries": 0}
    if gpus:
        options["num_gpus"] = 1
    waiting = ray.remote(num_cpus=0)(Queue).remote(list(shards))
    cwd = os.getcwd()

    def work(number: int) -> None:
        os.chdir(cwd)  # paths are those of the command

        def take() -> Iterator[int]:
            while (shard := ray.get(waiting.take.remote())) is not None:
                yield shard

        attribute(arguments, (number, count), take())

    task = ray.remote(**options)(work)
    running = [task.remote(number) for number in range(1, count + 1)]
    failure = None
    while running:
        done, running = ray.wait(running, timeout=POLL)
        progress(len(set(read_journals(Path(arguments.out))) & set(shards)))
        for ended in done:
            try:
                ray.get(ended)
            except ray.exceptions.RayTaskError as error:
                failure = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            except ray.exceptions.RayError:  # the process or its machine has ended: others take its shards
                continue
        time.sleep(0 if done else POLL / 10)
    return failure


def _told(progress: Callable[[int], None], before: int, now: int) -> None:
    progress(before + now)
