"""Evaluation: metrics of several attribution methods over a data set, as a table, values per image and plots."""

from __future__ import annotations

from ramp_fast.evaluation.evaluator import EXPLAINED, Data, Evaluator, evaluate
from ramp_fast.evaluation.result import Evaluation, EvaluationError
from ramp_fast.evaluation.stored import evaluate_maps

__all__ = ["EXPLAINED", "Data", "Evaluation", "EvaluationError", "Evaluator", "evaluate", "evaluate_maps"]
