"""Measuring an engine: workloads, runs and reports."""
