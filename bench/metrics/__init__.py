"""Benchmarks of metrics."""
