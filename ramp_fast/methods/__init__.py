"""Attribution methods to compare: functions ``(model, images [N, C, H, W], target [N]) -> maps [N, C or 1, H, W]``."""

from __future__ import annotations

from ramp_fast.explainer import Method
from ramp_fast.methods.baseline import Random
from ramp_fast.methods.gradients import gradient, input_x_gradient, logit_and_product
from ramp_fast.methods.registry import METHODS, MethodEntry, make_method
from ramp_fast.methods.rollout import attention_rollout
from ramp_fast.methods.through_captum import GradCAM, IntegratedGradients, Occlusion, SmoothGrad

__all__ = [
    "METHODS",
    "GradCAM",
    "IntegratedGradients",
    "Method",
    "MethodEntry",
    "Occlusion",
    "Random",
    "SmoothGrad",
    "attention_rollout",
    "gradient",
    "input_x_gradient",
    "logit_and_product",
    "make_method",
]
