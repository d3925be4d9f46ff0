"""``ramp-fast evaluate --maps``: metrics of maps that a store has."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ramp_fast.cli.common import chosen_device, complain, load, shows_bar, source_options, state_settings
from ramp_fast.errors import InputError
from ramp_fast.specs import literal

if TYPE_CHECKING:
    from ramp_fast.evaluation import Evaluation
    from ramp_fast.explainer import Model

__all__ = ["evaluate_store", "unfinished"]


def evaluate_store(arguments: argparse.Namespace, metrics: Sequence[str], with_engine: Any) -> Evaluation | None:
    """Evaluate what is missing; the result of all, or None for a part.

    Parameters
    ----------
    arguments : argparse.Namespace
        Of ``ramp-fast evaluate``. Options of the model that are not given are those of the store.
    metrics : sequence of str
    with_engine : callable
        ``(model, device, input shape)`` -> what is evaluated: the model, or an engine of it.

    Raises
    ------
    InputError
        An option says what the store says.
    StoreError
        The model or the images are not the store's.
    """
    from tqdm import tqdm

    from ramp_fast.evaluation import evaluate_maps
    from ramp_fast.evaluation.stored import check_model
    from ramp_fast.pipeline.planning import source_of
    from ramp_fast.results import open_maps

    store = open_maps(arguments.maps)
    _refuse_options(arguments)
    request = store.plan.request
    with warnings.catch_warnings():
        # Pillow warns of large images and odd metadata; what matters of it is a problem of the data here.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        source = source_of(request, arguments.data or request["paths"]["source"])
        loaded = load(_as_stored(arguments, request))
        check_model(store.plan.settings, state_settings(loaded), arguments.maps)
        device = chosen_device(arguments.device)
        model: Model = with_engine(loaded.model.to(device), device, loaded.preprocessing.input_size)
        shown = shows_bar(arguments)
        with tqdm(unit="image", file=sys.stderr, dynamic_ncols=True, disable=not shown) as bar:

            def progress(finished: int, total: int) -> None:
                bar.total = total
                bar.update(finished - bar.n)

            return evaluate_maps(
                store,
                model,
                metrics,
                arguments.out,
                source=source,
                part=arguments.shards,
                seed=arguments.seed,
                batch_size=arguments.batch_size,
                workers=1 if arguments.workers is None else arguments.workers,
                progress=progress,
            )


def unfinished(folder: str) -> int:
    """Say how many shards of a store have no maps yet, if any; returns how many."""
    from ramp_fast.results import open_maps

    store = open_maps(folder)
    missing = store.plan.shards - len(store.finished())
    if missing:
        complain(
            f"{folder}: {missing} of {store.plan.shards} shards have no maps yet and are not evaluated: `ramp-fast "
            "run` makes them, and this command then evaluates them"
        )
    return missing


def _refuse_options(arguments: argparse.Namespace) -> None:
    """What is asked for may not say otherwise than the store."""
    if arguments.method is not None:
        raise InputError("--method and --maps are two ways to say what is evaluated: pass one of them")
    if arguments.explain is not None:
        raise InputError("--explain: the maps of a store are those of the classes it was made for")
    options = source_options(arguments)
    given = [name for name in ("split", "labels", "limit") if options[name] is not None]
    given += ["layout"] * (options["layout"] != "auto") + ["class-of"] * (options["targets"] is not None)
    if given:
        raise InputError(f"--{given[0]}: the plan of the store says how its source is read")


def _as_stored(arguments: argparse.Namespace, request: Mapping[str, Any]) -> argparse.Namespace:
    """Options of the model, those that are not given as the store's run had them."""
    found = argparse.Namespace(**vars(arguments))
    for name in ("model", "num_classes", "mean", "std", "crop_pct"):
        if getattr(found, name) is None:
            setattr(found, name, request[name])
    for name in ("checkpoint", "class_names"):
        if getattr(found, name) is None:
            setattr(found, name, request["paths"][name])
    stored = {key: literal(value) for key, value in request["model_args"].items()}
    found.model_arg = list({**stored, **dict(arguments.model_arg)}.items())
    return found
