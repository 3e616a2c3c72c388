"""Benchmarks of lm-evaluation-harness on the engine; see README.md."""
