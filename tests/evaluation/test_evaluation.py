"""Evaluations: what is computed, in which order, what fails, and how results are kept and shown."""

from __future__ import annotations

import csv
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ramp_fast import Engine, InputError
from ramp_fast.data import Batch
from ramp_fast.evaluation import Evaluation, EvaluationError, Evaluator, evaluate
from ramp_fast.methods import input_x_gradient
from ramp_fast.metrics import GAE, Deletion, PointingGame
from ramp_fast.metrics.base import Result
from ramp_fast.results.marks import is_own
from ramp_fast.specs import parse_spec

METRICS = ["gae:steps=3", "deletion:steps=4,granularity=patch:4", "sparseness"]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().double().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(10, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.randint(0, 5, (10,), generator=torch.Generator().manual_seed(2))


def broken(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    raise ZeroDivisionError("no luck")


def values(result: Evaluation, method: str, metric: str) -> Tensor:
    found = result.results[method][metric]
    return found.values[found.name]


def test_values_are_those_of_the_metrics(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    result = evaluate(model, (images, labels), METRICS, {"ixg": "ixg", "mine": input_x_gradient}, batch_size=4, seed=3)
    gae = GAE(model, steps=3, seed=3)
    gae.update(images[:8], labels[:8], input_x_gradient)
    deletion = Deletion(model, steps=4, granularity="patch:4", seed=3)
    deletion.update(images, labels, input_x_gradient)
    for method in ("ixg", "mine"):
        torch.testing.assert_close(values(result, method, METRICS[0]), gae.compute().values["gae"])
        torch.testing.assert_close(values(result, method, METRICS[1]), deletion.compute().values["deletion"].double())
    assert list(result.results) == ["ixg", "mine"]
    assert list(result.results["ixg"]) == METRICS
    assert result.images == 10
    assert result.left_out == {METRICS[0]: 2}
    assert not result.failures


def test_results_do_not_depend_on_batches(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    methods = ["random", "ixg"]
    whole = evaluate(model, (images, labels), METRICS, methods, batch_size=16)
    parts = [(images[:3], labels[:3]), (images[3:4], labels[3:4]), (images[4:], labels[4:])]
    for other in (
        evaluate(model, (images, labels), METRICS, methods, batch_size=3),
        evaluate(model, parts, METRICS, methods),
        evaluate(model, [Batch(*p, None, []) for p in parts], METRICS, methods),
    ):
        for method in methods:
            for metric in METRICS:
                torch.testing.assert_close(values(other, method, metric), values(whole, method, metric))


def test_the_engine_comes_first_and_its_maps_are_shared(model: nn.Module, images: Tensor) -> None:
    engine = Engine(model, precision="float64")
    calls = []

    def counted(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        calls.append(images.shape[0])
        return input_x_gradient(model, images, target)

    result = engine.evaluate(images, METRICS[1:], {"counted": counted}, batch_size=5)
    assert list(result.results) == ["abslrp", "counted"]
    assert calls == [5, 5]  # for two metrics
    alone = Deletion(model, steps=4, granularity="patch:4").update(images, None, engine)
    torch.testing.assert_close(values(result, "abslrp", METRICS[1]), alone["deletion"].double())
    with pytest.raises(InputError, match="called 'abslrp' itself"):
        engine.evaluate(images, METRICS, {"abslrp": input_x_gradient})
    renamed = engine.evaluate(images[:2], ["sparseness"], {"ours": engine})
    assert list(renamed.results) == ["ours"]


def test_which_class_is_explained(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    seen: list[Tensor] = []

    def record(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return images

    evaluate(model, (images, labels), ["sparseness"], {"m": record})
    evaluate(model, (images, labels), ["sparseness"], {"m": record}, explain="predicted")
    evaluate(model, images, ["sparseness"], {"m": record})
    with torch.no_grad():
        predicted = model(images).argmax(1)
    assert seen[0].equal(labels)
    assert seen[1].equal(predicted)
    assert seen[2].equal(predicted)
    assert not predicted.equal(labels)


def test_failures_stop_a_pair_and_nothing_else(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    calls = []

    def sometimes(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise ZeroDivisionError("no luck")
        return images

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = evaluate(
            model, (images, labels), METRICS[1:], {"ixg": "ixg", "bad": broken, "late": sometimes}, batch_size=4
        )
    assert set(result.failures) == {f"{m} / {metric}" for m in ("bad", "late") for metric in METRICS[1:]}
    message = result.failures[f"late / {METRICS[1]}"]
    for part in ("method late", METRICS[1], "batch 1", "ZeroDivisionError: no luck"):
        assert part in message
    assert len(caught) == 4
    assert len(calls) == 2  # not asked again
    assert values(result, "ixg", METRICS[1]).numel() == 10
    assert values(result, "late", METRICS[1]).numel() == 4  # finished work is kept
    assert result.results["bad"] == {}
    assert "failed" in str(result)
    with pytest.raises(EvaluationError, match="method bad, metric sparseness, batch 0") as error:
        evaluate(model, images, ["sparseness"], {"ixg": "ixg", "bad": broken}, strict=True)
    assert values(error.value.partial, "ixg", "sparseness").numel() == 10


def test_one_metric_that_fails_leaves_the_others(model: nn.Module, images: Tensor) -> None:
    def shrinks(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        return images if images.shape[0] == 4 else images[:0]  # right for the images, wrong for GAE's six

    with pytest.warns(RuntimeWarning, match="metric gae:steps=3"):
        result = evaluate(model, images[:4], ["gae:steps=3", "sparseness"], {"m": shrinks})
    assert list(result.failures) == ["m / gae:steps=3"]
    assert list(result.results["m"]) == ["sparseness"]


def test_what_stops_an_evaluation_leaves_what_was_done(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    def loader() -> Any:
        yield images[:4], labels[:4]
        raise OSError("disk gone")

    later = [(images[:4], labels[:4]), (images[4:], labels[:1])], [(images[:5],), (images[5:, :, :8],)]
    for data, problem in ((loader(), "disk gone"), (later[0], "6 entries"), (later[1], "groups of 4 of one size")):
        with pytest.raises(EvaluationError, match=problem) as error:
            evaluate(model, data, ["sparseness", "gae:steps=2"], ["ixg"])
        assert values(error.value.partial, "ixg", "sparseness").numel() in (4, 5)


def test_lists_of_tensors_are_one_batch(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    whole = evaluate(model, (images, labels), ["deletion:steps=3"], ["ixg"])
    listed = evaluate(model, [images, labels], ["deletion:steps=3"], ["ixg"])
    batches = evaluate(model, [images[:5], images[5:]], ["deletion:steps=3"], ["ixg"], explain="predicted")
    assert listed.rows() == whole.rows()
    assert batches.images == 10


def test_data_are_read_no_further_when_nothing_is_left(model: nn.Module, images: Tensor) -> None:
    read = []

    def loader() -> Any:
        for i in range(10):
            read.append(i)
            yield (images[i : i + 1],)

    with pytest.warns(RuntimeWarning, match="bad"):
        evaluate(model, loader(), ["sparseness"], {"bad": broken})
    assert len(read) == 1


def test_a_method_may_write_to_its_arguments(model: nn.Module, images: Tensor) -> None:
    def careless(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        maps = input_x_gradient(model, images, target)
        images.zero_()
        target.zero_()
        return maps

    before = images.clone()
    result = evaluate(model, images, ["deletion:steps=3"], {"careless": careless, "ixg": "ixg"})
    assert images.equal(before)
    assert values(result, "careless", "deletion:steps=3").equal(values(result, "ixg", "deletion:steps=3"))


def test_processes_that_share_the_data(model: nn.Module, images: Tensor) -> None:
    metric = "aopc:regions=4,granularity=patch:4"
    whole = evaluate(model, images, [metric], ["ixg"])
    run = Evaluator(model, [metric], ["ixg"], first_image=6)
    run.update(Batch(images[6:], None, None, []))
    assert values(run.result(), "ixg", metric).equal(values(whole, "ixg", metric)[6:])
    run = Evaluator(model, [metric], ["ixg"])
    run.update(Batch(images[6:], None, None, []))
    assert not values(run.result(), "ixg", metric).equal(values(whole, "ixg", metric)[6:])


def test_logits_that_are_not_finite(images: Tensor) -> None:
    class Overflow(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 0.0

    model = Overflow().double().eval()
    for metric in ("road:percentages=(10,)", "monotonicity:steps=3", "deletion:steps=2"):
        with pytest.warns(RuntimeWarning, match=r"logits of .* are not finite"):
            result = evaluate(model, images[:2], [metric], {"m": lambda model, images, target: images})
        assert result.results["m"] == {}


def test_masks_reach_metrics_of_localisation(model: nn.Module, images: Tensor) -> None:
    masks = torch.zeros(10, 16, 16, dtype=torch.bool)
    masks[:, :, :8] = True
    result = evaluate(model, (images, None, masks), ["pointing_game"], ["ixg"], batch_size=3)
    alone = PointingGame(model).update(images, None, input_x_gradient, masks=masks)
    torch.testing.assert_close(values(result, "ixg", "pointing_game"), alone["pointing_game"].double())
    with pytest.raises(InputError, match="pointing_game: the data have no masks"):
        evaluate(model, images, ["pointing_game"], ["ixg"])


def test_metrics_as_objects_are_templates(model: nn.Module, images: Tensor) -> None:
    mine = Deletion(model, steps=3)
    mine.update(images[:2], None, input_x_gradient)
    result = evaluate(model, images, {"short": mine, "long": "deletion:steps=6"}, ["ixg", "random"])
    assert values(result, "ixg", "short").numel() == 10
    assert mine.compute().count == 2
    with pytest.raises(InputError, match="another model"):
        evaluate(Small().eval(), images, [mine], ["ixg"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"metrics": ["delition"]}, "no metric 'delition'"),
        ({"metrics": ["deletion:depth=3"]}, "no setting 'depth'"),
        ({"metrics": ["deletion:steps"]}, "not key=value"),
        ({"metrics": ["deletion:seed=1.5"]}, "seed must be an integer"),
        ({"metrics": ["deletion:noise=much"]}, "noise must be"),
        ({"metrics": ["deletion:baseline=1e999"]}, "not finite"),
        ({"metrics": ["infidelity:rescaled=maybe"]}, "rescaled must be true or false"),
        ({"methods": ["gradcam:relu=yes"]}, "relu must be true or false"),
        ({"data": (torch.zeros(2, 3, 16, 16).double(), torch.tensor([0, 5]))}, "batch 0: target must be 0 to 4"),
        ({"data": (torch.zeros(2, 3, 16, 16), None, torch.zeros(2, 16, 16))}, "masks must be a bool"),
        ({"metrics": ["deletion", "deletion"]}, "there twice"),
        ({"metrics": []}, "nothing to evaluate"),
        ({"methods": ["lrp"]}, "unknown method 'lrp'"),
        ({"methods": {"m": 3}}, "a method is"),
        ({"batch_size": 0}, "batch_size"),
        ({"explain": "all"}, "explain must be"),
        ({"data": torch.zeros(3, 16, 16)}, r"\[N, C, H, W\]"),
        ({"data": (torch.zeros(2, 3, 16, 16), torch.zeros(3).long())}, "2 entries"),
        ({"data": ["a"]}, "data must be"),
    ],
)
def test_what_does_not_fit(model: nn.Module, images: Tensor, change: dict[str, Any], problem: str) -> None:
    def never(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        pytest.fail("computed before the arguments were checked")

    arguments = {"data": images, "metrics": ["deletion"], "methods": {"m": never}, **change}
    with pytest.raises(InputError, match=problem):
        evaluate(model, **arguments)


def test_saved_and_loaded(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    class Undefined(Deletion):
        name = "undefined"

        def measure(self, sample: Any, **options: Any) -> dict[str, Tensor]:
            found = super().measure(sample)
            found[self.name][0], found["curve"][1, 1] = math.nan, -math.inf
            return found

    run = Evaluator(model, {"d": Undefined(model, steps=3)}, ["ixg", "random"])
    run.update(Batch(images, None, None, [f"photo {i}" for i in range(10)]))
    result = run.result()
    result.save(tmp_path / "result.json")
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)  # no NaN: other readers choke on it
    again = Evaluation.load(tmp_path / "result.json")
    assert again.rows() == result.rows()
    assert again.results["ixg"]["d"].count == 9
    for name, expected in result.results["ixg"]["d"].values.items():
        torch.testing.assert_close(again.results["ixg"]["d"].values[name], expected, rtol=0, atol=0, equal_nan=True)
    assert (again.names, again.metrics, again.seconds) == (result.names, result.metrics, result.seconds)
    for wrong in ("{}", "[", '{"format": 99}', '{"format": 1, "results": []}'):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(InputError, match=r"wrong\.json"):
            Evaluation.load(tmp_path / "wrong.json")

    result.to_csv(tmp_path / "table.csv")
    result.to_csv(tmp_path / "values.csv", per_image=True)
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["method"] for r in rows] == ["ixg", "random"]
    assert float(rows[0]["mean"]) == result.results["ixg"]["d"].mean
    with open(tmp_path / "values.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert rows[3]["image"] == "photo 3"
    assert float(rows[3]["value"]) == values(result, "ixg", "d")[3].item()


def test_names_that_a_spreadsheet_would_compute(tmp_path: Path) -> None:
    names = ["=1+1", "-x", "+x", "@x", "\uff1dx", "a=b", "a\r=1", "a\n,", "\t=1", "caf\udce9", "日\u3000本"]
    about = {"higher_is_better": True, "settings": {}, "group": 1, "axis": None}
    numbers = torch.linspace(-1, 1, len(names), dtype=torch.float64)
    result = Evaluation({"=m": {"d": Result("d", {"d": numbers})}}, {"d": about}, names=names, images=len(names))
    result.to_csv(tmp_path / "values.csv", per_image=True)
    with open(tmp_path / "values.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [
        *(f"'{name}" for name in names[:5]),
        *("a=b", r"a\r=1", r"a\n,", r"\t=1", r"caf\udce9", "日\u3000本"),
    ]
    assert {row["method"] for row in rows} == {"'=m"}
    assert [float(row["value"]) for row in rows] == numbers.tolist()  # negative ones as they are


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    about = {"higher_is_better": True, "settings": {}, "group": 1, "axis": None}
    result = Evaluation({"m": {"d": Result("d", {"d": torch.ones(1)})}}, {"d": about}, images=1)
    result.save(tmp_path / "a.json")
    result.to_csv(tmp_path / "b.csv")
    result.to_csv(tmp_path / "c.csv", per_image=True)
    for name in ("a.json", "b.csv", "c.csv"):
        assert is_own(tmp_path / name)
        (tmp_path / name).write_text('{"format": 1}' if name == "a.json" else "method,metric\n")
        assert not is_own(tmp_path / name)


def test_tables(model: nn.Module, images: Tensor) -> None:
    pandas = pytest.importorskip("pandas")
    result = evaluate(model, images, ["deletion:steps=3", "sparseness"], ["ixg"])
    frame = result.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["mean"].tolist() == [row["mean"] for row in result.rows()]
    lines = str(result).splitlines()
    assert lines[0].split() == ["method", "deletion:steps=3", "↓", "sparseness", "↑"]
    assert lines[1].startswith("ixg")
    assert f"{result.rows()[0]['mean']:.3f}" in lines[1]
    assert result.markdown().splitlines()[2].startswith("| ixg | ")


def test_plots(model: nn.Module, images: Tensor) -> None:
    pytest.importorskip("matplotlib")
    result = evaluate(model, images, ["deletion:steps=3", "abpc:steps=3", "sparseness"], ["ixg", "random"])
    bars = result.plot()
    assert len(bars.axes) == 3
    widths = [bar.get_width() for bar in bars.axes[0].patches]
    assert widths == pytest.approx([result.results[m]["deletion:steps=3"].mean for m in ("ixg", "random")])
    result.results["ixg"]["deletion:steps=3"].values["curve"][0] = math.nan  # not defined for one image
    curves = result.plot("curves")
    assert [a.get_title() for a in curves.axes] == ["deletion:steps=3", "abpc:steps=3"]
    drawn = curves.axes[0].lines[0]
    expected = result.results["ixg"]["deletion:steps=3"].values["curve"][1:].mean(0)
    assert list(drawn.get_xdata()) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert list(drawn.get_ydata()) == pytest.approx(expected.tolist())
    assert len(curves.axes[1].lines) == 4  # two curves of two methods
    with pytest.raises(InputError, match="has curves"):
        result.plot("curves", ["sparseness"])
    with pytest.raises(InputError, match="kind"):
        result.plot("pie")
    with pytest.raises(InputError, match="no metric 'gae'"):
        result.plot(metrics=["gae"])


def test_specs() -> None:
    assert parse_spec("gae") == ("gae", {})
    assert parse_spec("deletion:steps=50,granularity=patch:8") == ("deletion", {"steps": 50, "granularity": "patch:8"})
    assert parse_spec("road:percentages=(1, 5.5),noise=0.1") == ("road", {"percentages": (1, 5.5), "noise": 0.1})
    assert parse_spec("a:b=[(1, 2), (3, 4)],c=False,d=false,e=None,f=none")[1] == {
        "b": [(1, 2), (3, 4)],
        **{"c": False, "d": False, "e": None, "f": None},
    }
    assert parse_spec("a:b={[]: 1}")[1] == {"b": "{[]: 1}"}
    with pytest.raises(InputError, match="'3' is not key=value"):
        parse_spec("road:3")
    with pytest.raises(InputError, match="nested too deeply"):
        parse_spec("road:noise=" + "-" * 20000 + "1")


@pytest.mark.parametrize(
    ("count", "quantile"),  # of Student's distribution with count - 1 degrees of freedom, from tables
    [(2, 12.706), (3, 4.303), (4, 3.182), (6, 2.571), (11, 2.228), (31, 2.042), (1001, 1.962), (10**6, 1.95997)],
)
def test_confidence_interval(count: int, quantile: float) -> None:
    values = torch.cat([torch.zeros(count // 2), torch.ones(count - count // 2), torch.full((3,), torch.nan)]).double()
    result = Result("m", {"m": values})
    low, high = result.confidence_interval
    assert (low + high) / 2 == pytest.approx(result.mean)
    assert (high - low) / 2 == pytest.approx(quantile * result.standard_error, rel=1.5e-3)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    draw = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(2000):
        low, high = Result("m", {"m": torch.randn(8, generator=draw).double() + 3}).confidence_interval
        inside += low < 3 < high
    assert 0.935 < inside / 2000 < 0.965


def test_one_value_has_no_interval() -> None:
    low, high = Result("m", {"m": torch.ones(1)}).confidence_interval
    assert math.isnan(low)
    assert math.isnan(high)
