"""The store: ordinary zarr, the same bytes however often it was interrupted, and nothing torn."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_of_ramps as ramps
import torch

from ramp_fast.errors import InputError
from ramp_fast.results import StoreError, open_maps
from ramp_fast.results.map_writer import BusyError, MapWriter, check_file
from ramp_fast.results.maps import read_journal
from ramp_fast.results.zarr_files import crc32c

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes by fork")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    ramps.write(folder, ramps.plan_of())
    return folder


class TestReading:
    def test_by_number_and_by_name(self, whole: Path) -> None:
        maps = open_maps(whole)
        assert len(maps) == ramps.COUNT
        arrays = ramps.batch_of(maps.plan, range(4, 7))
        found = maps["folder/image 5"]
        expected = arrays["maps"][1].astype(np.float32) * arrays["scale"][1]
        np.testing.assert_array_equal(found.map, expected)
        np.testing.assert_array_equal(found.logits, arrays["logits"][1])
        assert (found.name, found.done, found.label) == ("folder/image 5", True, int(arrays["label"][1]))
        np.testing.assert_array_equal(maps[-5].map, expected)
        for missing, error in ((ramps.COUNT, IndexError), (-11, IndexError), ("image 5", KeyError)):
            with pytest.raises(error):
                maps[missing]

    def test_what_failed_is_not_done(self, whole: Path) -> None:
        maps = open_maps(whole)
        assert maps.done.tolist() == [number not in ramps.FAILED for number in range(ramps.COUNT)]
        assert maps.failures() == {"folder/image 6": ramps.FAILED[6]}
        assert (whole / "failures.csv").read_text() == f"image,why\nfolder/image 6,{ramps.FAILED[6]}\n"
        assert not maps[6].map.any()
        assert not maps[6].done

    def test_parts_of_arrays(self, whole: Path) -> None:
        maps = open_maps(whole)
        for name in maps.plan.arrays:
            all_of_it = maps.array(name)
            np.testing.assert_array_equal(maps.array(name, 3, 9), all_of_it[3:9])
            assert len(maps.array(name, 5, 5)) == 0
        with pytest.raises(InputError, match="no array 'map' in a store; there are maps, scale"):
            maps.array("map")

    def test_as_data_set_in_other_processes(self, whole: Path) -> None:
        maps = pickle.loads(pickle.dumps(open_maps(whole)))
        data = maps.dataset()
        assert len(data) == ramps.COUNT - 1
        assert len(maps.dataset(done_only=False)) == ramps.COUNT
        (batch,) = torch.utils.data.DataLoader(data, 16)
        assert batch["map"].shape == (9, 2, 3)
        assert batch["index"].tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
        np.testing.assert_array_equal(batch["map"][6].numpy(), maps[7].map)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
    @pytest.mark.parametrize("targets", [("predicted",), ("predicted", "label")])
    def test_any_reader_of_zarr_sees_the_same(self, tmp_path: Path, dtype: str, targets: tuple[str, ...]) -> None:
        zarr = pytest.importorskip("zarr", minversion="3")
        ramps.write(tmp_path / "s", ramps.plan_of(dtype=dtype, targets=targets))
        maps = open_maps(tmp_path / "s")
        group = zarr.open_group(tmp_path / "s" / "maps.zarr", mode="r")
        assert sorted(name for name, _ in group.arrays()) == sorted(maps.plan.arrays)
        for name, spec in maps.plan.arrays.items():
            found = group[name]
            assert found.dtype == np.dtype(spec.dtype)
            assert found.metadata.dimension_names == spec.dimensions
            np.testing.assert_array_equal(found[:], maps.array(name))
            np.testing.assert_array_equal(found[5], maps.array(name)[5])

    def test_unfinished_shards_have_fill_values(self, whole: Path, tmp_path: Path) -> None:
        with MapWriter(tmp_path / "s") as store:
            store.create(ramps.plan_of(), ramps.images_of())
        maps = open_maps(tmp_path / "s")
        assert not maps.done.any()
        assert (maps.array("target") == -1).all()
        assert maps[0].label is None

    def test_checksum_of_rfc_3720(self) -> None:
        assert crc32c(b"\x00" * 32) == 0x8A9136AA
        assert crc32c(bytes(range(32))) == 0x46DD794E

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda text: text.replace('"rule": "a"', '"rule": "b"'), "its hash is another one"),
            (lambda text: text[:40], "damaged, or no plan"),
            (lambda text: "[]", "damaged, or no plan"),
        ],
    )
    def test_damaged_plans_are_refused(
        self, whole: Path, tmp_path: Path, damage: Callable[[str], str], message: str
    ) -> None:
        (tmp_path / "plan.json").write_text(damage((whole / "plan.json").read_text()))
        with pytest.raises(StoreError, match=message):
            open_maps(tmp_path)

    def test_no_store(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"not a store of maps: no plan\.json"):
            open_maps(tmp_path)
        with pytest.raises(StoreError, match="no such folder"):
            open_maps(tmp_path / "x")


class TestWriting:
    def test_the_order_in_which_things_reach_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Power may go at any moment: bytes before a name, names before the journal's line."""
        events: list[tuple[str, str]] = []
        fsync, replace = os.fsync, os.replace

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

        def replaced(source: Any, target: Any) -> None:
            events.append(("name", str(target)))
            assert ("sync", str(source)) in events, "a name before its bytes"
            replace(source, target)

        if not os.path.isdir("/proc/self/fd"):
            pytest.skip("no names of descriptors here")
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", replaced)
        ramps.write(tmp_path / "s", ramps.plan_of())
        journal = str(tmp_path / "s" / "journal.jsonl")
        lines = [place for place, event in enumerate(events) if event == ("sync", journal)]
        assert len(lines) == 3
        for shard, at in enumerate(lines):
            before = events[:at]
            for spec in ramps.plan_of().arrays.values():
                path = tmp_path / "s" / "maps.zarr" / spec.file(shard)
                named = before.index(("name", str(path)))
                assert ("sync", str(path.parent)) in before[named:], "a line before the name is on the disk"

    @needs_fork
    def test_killed_at_every_third_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process ends at its n-th call of the system; another one goes on: the same bytes."""
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # takes a second a store, and saves from no kill
        plan = ramps.plan_of(6)
        ramps.write(tmp_path / "whole", plan)
        expected = ramps.contents(tmp_path / "whole")
        step = -2
        while True:
            step += 3
            folder = tmp_path / str(step)
            process = multiprocessing.get_context("fork").Process(target=_killed_at, args=(folder, step))
            process.start()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            ramps.write(folder, plan)
            assert ramps.contents(folder) == expected, step
        assert step > 60
        assert ramps.contents(folder) == expected

    @needs_fork
    def test_parts_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever is first makes the plan; files are those of one run."""
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        plan = ramps.plan_of(30)
        ramps.write(tmp_path / "whole", plan)
        fork = multiprocessing.get_context("fork")
        parts = [fork.Process(target=ramps.write, args=(tmp_path / "parts", plan, (number, 3))) for number in (1, 2, 3)]
        for process in parts:
            process.start()
        for process in parts:
            process.join()
            assert process.exitcode == 0
        found, expected = ramps.contents(tmp_path / "parts"), ramps.contents(tmp_path / "whole")
        journals = {name for name in found if name.startswith("journal")}
        assert len(journals) == 3
        expected.pop("journal.jsonl")
        assert {name: data for name, data in found.items() if name not in journals} == expected

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_no_room(self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        expected = ramps.contents(whole)
        original = getattr(os, call) if call == "replace" else lambda descriptor: None
        for step in range(1, 30, 3):
            calls = 0

            def full(*arguments: Any, step: int = step) -> None:
                nonlocal calls
                calls += 1
                if calls == step:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                original(*arguments)

            folder = tmp_path / str(step)
            with monkeypatch.context() as patch:
                patch.setattr(os, call, full)
                with pytest.raises(StoreError, match="No space left on device; what is finished is kept"):
                    ramps.write(folder, ramps.plan_of())
                assert not list(folder.rglob(".*")), "something temporary is left"
                patch.setattr(os, call, original)
                ramps.write(folder, ramps.plan_of())
            assert ramps.contents(folder) == expected

    def test_a_torn_journal(self, whole: Path, tmp_path: Path) -> None:
        ramps.write(tmp_path / "s", ramps.plan_of())
        journal = tmp_path / "s" / "journal.jsonl"
        data = journal.read_bytes()
        for torn in (data[:-1], data[:-20], data + b"\0" * 100, data + b'{"shard": 1', data[: data.index(b"\n") + 5]):
            journal.write_bytes(torn)
            ramps.write(tmp_path / "s", ramps.plan_of())
            assert ramps.contents(tmp_path / "s") == ramps.contents(whole)

    @pytest.mark.parametrize("name", ["maps", "done"])
    def test_lost_files_are_computed_again(self, whole: Path, tmp_path: Path, name: str) -> None:
        ramps.write(tmp_path / "s", ramps.plan_of())
        spec = ramps.plan_of().arrays[name]
        path = tmp_path / "s" / "maps.zarr" / spec.file(1)
        path.write_bytes(path.read_bytes()[:-1])
        with MapWriter(tmp_path / "s") as store:
            assert store.stored.finished() == {0, 2}
        ramps.write(tmp_path / "s", ramps.plan_of())
        again = ramps.contents(tmp_path / "s")
        again["journal.jsonl"] = (whole / "journal.jsonl").read_bytes()  # which has a line more
        assert again == ramps.contents(whole)

    def test_damage_of_equal_size_is_found(self, tmp_path: Path) -> None:
        plan = ramps.plan_of()
        ramps.write(tmp_path / "s", plan)
        spec = plan.arrays["maps"]
        path = tmp_path / "s" / "maps.zarr" / spec.file(0)
        digest = read_journal(tmp_path / "s" / "journal.jsonl")[0][0].files["maps"]
        assert check_file(path, spec, plan, 0, digest) is None
        data = bytearray(path.read_bytes())
        data[3] ^= 1
        path.write_bytes(data)
        assert check_file(path, spec, plan, 0, digest) == "damaged: its SHA-256 is not the journal's"

    def test_one_run_at_a_time(self, tmp_path: Path) -> None:
        with MapWriter(tmp_path / "s") as store:
            store.create(ramps.plan_of(), ramps.images_of())
            with pytest.raises(BusyError, match=f"being written by another run .process {os.getpid()}.: wait for it"):
                MapWriter(tmp_path / "s")
        with MapWriter(tmp_path / "s"):
            pass

    def test_other_files_are_kept(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(StoreError, match=r"holds other files \(thesis.tex\) and no store of maps"):
            MapWriter(tmp_path)
        assert os.listdir(tmp_path) == ["thesis.tex"]

    def test_images_of_another_plan(self, tmp_path: Path) -> None:
        ramps.write(tmp_path / "s", ramps.plan_of())
        lines = (tmp_path / "s" / "images.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "s" / "images.jsonl").write_text("".join(lines[1:]))
        with pytest.raises(StoreError, match=r"images\.jsonl: damaged"):
            MapWriter(tmp_path / "s")

    def test_plain_json(self, whole: Path) -> None:
        document = json.loads((whole / "plan.json").read_text())
        assert document["maps"] == {"shape": [2, 3], "dtype": "float16", "targets": ["predicted"], "channels": False}


def _killed_at(folder: Path, step: int) -> None:
    """Write a store; at the n-th call that changes the disk, end as by SIGKILL."""
    calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return instead

    for name in ("fsync", "replace", "mkdir", "truncate"):
        setattr(os, name, counted(getattr(os, name)))
    ramps.write(folder, ramps.plan_of(6))
