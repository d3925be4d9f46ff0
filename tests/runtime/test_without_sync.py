"""Runs on a CUDA device without one: nothing waits for it.

Fake tensors know shapes, dtypes and devices and refuse to tell their values: whatever would wait for the device
(``.item()``, ``bool(tensor)``, boolean masks) or mix devices raises.
"""

from __future__ import annotations

import pytest
import torch
from small_models import CLASSES, FAMILIES, SIZE
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ramp_fast import Engine, gemm, rules
from ramp_fast import graph as g
from ramp_fast.capture import capture
from ramp_fast.capture.passes import canonicalize
from ramp_fast.gemm import precision_for
from ramp_fast.plan import Plan
from ramp_fast.rules import AbsLRP, RelativeStabilizer
from ramp_fast.runtime.run import pull_back, run_forward
from ramp_fast.runtime.targets import Target

CUDA = torch.device("cuda", 0)


def test_fake_tensors_notice_a_wait() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.ones(3, device=CUDA).any())


@pytest.mark.parametrize("contrast", ["others", "none"])
@pytest.mark.parametrize("precision", ["mixed", "float32", "fast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_never_waits_for_the_device(
    name: str, precision: str, contrast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gemm, "shared_layer", lambda _, sources, pack: gemm.PackedLayer(*pack(), sources)
    )  # asks for addresses
    rule = rules.resolve(AbsLRP(stabilizer=RelativeStabilizer(0.1)))
    graph = capture(FAMILIES[name](), (3, SIZE, SIZE), strict=True)
    canonicalize(graph, rule.rewrites())
    with FakeTensorMode() as mode, torch.no_grad():
        for node in graph.nodes:
            if node.kind == g.PARAM:
                node.params.tensor = mode.from_tensor(node.params.tensor).to(CUDA)
        plan = Plan(graph, rule, precision_for(precision, CUDA))
        plan.prepare()
        images = torch.empty(4, 3, SIZE, SIZE, dtype=plan.precision.forward, device=CUDA)
        target = Target(None, 4, CLASSES, contrast)
        forward = run_forward(plan, images)
        logits = forward.logits
        maps = pull_back(plan, forward, target.seed(logits, None, rule)[1], target.contrast)
    assert maps.device == logits.device == CUDA
    assert maps.shape == ((2 if contrast == "others" else 1), 4, 3, SIZE, SIZE)
    assert logits.shape == (4, CLASSES)


def test_masks_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # fake tensors cannot tell what a mask hides: here the CPU's own stay silent
    model = SwinTransformer(
        img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(2,), num_heads=(2,), num_classes=CLASSES
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias" in name:
                parameter.normal_()
    engine = Engine(model, precision="float32", input_shape=(3, 16, 16), micro_batch=2)
    target = Target(None, 2, CLASSES, "others")

    def silent(self: Tensor) -> bool:
        raise AssertionError("a run looks at a value")

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__bool__", silent)
        with pytest.raises(AssertionError, match="looks at a value"):
            bool(torch.ones(1) > 0)
        forward = run_forward(engine.plan, torch.randn(2, 3, 16, 16))
        maps = pull_back(engine.plan, forward, target.seed(forward.logits, None, engine.rule)[1], True)
    assert maps.isfinite().all()
