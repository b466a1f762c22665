"""Benchmarks of torchconv against its peers: `python -m benchmarks.run` and others."""
