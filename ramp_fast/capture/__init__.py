"""A PyTorch model becomes a graph of some thirty kinds of operation."""

from __future__ import annotations

from ramp_fast.capture.export import capture, static_batch
from ramp_fast.capture.passes import canonicalize

__all__ = ["canonicalize", "capture", "static_batch"]
