"""Attribution methods to compare: functions ``(model, images [N, C, H, W], target [N]) -> maps [N, C or 1, H, W]``."""

from __future__ import annotations

from ramp_fast.methods.gradients import input_x_gradient, logit_and_product

__all__ = ["input_x_gradient", "logit_and_product"]
