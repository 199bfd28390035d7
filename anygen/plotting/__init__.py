"""Curves of a run, from the lines of its `metrics.jsonl`."""
