"""A store of maps as a folder with a page for a browser: overview, classes, gallery, a random sample."""

from __future__ import annotations

from ramp_fast.report.photographs import Photographs
from ramp_fast.report.writing import check_target, write_report

__all__ = ["Photographs", "check_target", "write_report"]
