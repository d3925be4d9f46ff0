"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from shared_exports import shared

from ramp_fast.capture import export

# Files that are about capture: each of their models is exported by itself.
OWN_EXPORTS = {
    "test_model_checks",
    "test_models",
    "test_no_trace",
    "test_patched",
    "test_preserve",
    "test_batch_axes",
    "test_vocabulary",
    "test_written_out",
}
_shared = shared(export._exported)


@pytest.fixture(autouse=True, scope="module")  # so that fixtures of modules share them too
def _exports(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.module.__name__.rpartition(".")[2] in OWN_EXPORTS:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_exported", _shared)
        yield
