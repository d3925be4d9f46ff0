"""``ramp-fast run --ray``, on a cluster of this machine: the bytes of a run without, also where workers are lost."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramp_fast import cli
from ramp_fast.cli.on_ray import Queue, run_on_ray
from ramp_fast.errors import RampFastError
from ramp_fast.results import open_maps

sys.path.append(str(Path(__file__).parents[1] / "pipeline"))  # also in the workers, which unpickle from there
import store_of_ramps as ramps

needs_ray = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 otherwise: for ever where other tests run
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def test_every_shard_is_given_once() -> None:
    queue = Queue([3, 1, 4])
    assert [queue.take() for _ in range(5)] == [3, 1, 4, None, None]


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = argparse.Namespace(ray="local", out=str(tmp_path))
    with pytest.raises(RampFastError, match=r"--ray needs Ray: pip install 'ramp_fast\[ray\]'"):
        run_on_ray(arguments, [0], lambda *_: None, lambda _: None)


def test_two_ways_to_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(tmp_path), "--out", str(tmp_path / "s"), "--ray", "--shards", "1/2"]) == 2
    assert "--shards and --ray are two ways to share a run" in capsys.readouterr().err


def losing(arguments: argparse.Namespace, part: tuple[int, int], shards: Iterator[int]) -> None:
    """Writes some shards, takes another one, and is gone; the second worker writes all that it is given."""
    from ramp_fast.results.map_writer import MapWriter

    flag = Path(arguments.out).with_suffix(".lost")
    with MapWriter(arguments.out, part) as store:
        assert store.plan is not None
        for number, shard in enumerate(shards):
            if number == arguments.written and not flag.exists():
                flag.touch()
                os._exit(1)
            ramps.write_shard(store, shard)


def failing(arguments: argparse.Namespace, part: tuple[int, int], shards: Iterator[int]) -> None:
    raise ValueError("no weights here")


@needs_ray
@pytest.mark.parametrize("written", [0, 1])
def test_lost_workers(tmp_path: Path, cluster: None, written: int) -> None:
    plan = ramps.plan_of(30)
    ramps.write(tmp_path / "whole", plan)
    out = tmp_path / "store"
    with ramps.MapWriter(out) as store:
        store.create(plan, ramps.images_of(30))
    told: list[int] = []
    arguments = argparse.Namespace(ray="local", out=str(out), written=written)
    run_on_ray(arguments, range(plan.shards), losing, told.append)
    assert out.with_suffix(".lost").exists()
    assert told[-1] == plan.shards
    assert open_maps(out).finished() == set(range(plan.shards))
    for path in (tmp_path / "whole" / "maps.zarr").rglob("c.*"):
        assert (out / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


@needs_ray
def test_workers_that_fail(tmp_path: Path, cluster: None) -> None:
    with ramps.MapWriter(tmp_path / "s") as store:
        store.create(ramps.plan_of(), ramps.images_of())
    arguments = argparse.Namespace(ray="local", out=str(tmp_path / "s"))
    with pytest.raises(RampFastError, match=r"ended before 3 shards were finished: .*no weights here"):
        run_on_ray(arguments, range(3), failing, lambda _: None)
