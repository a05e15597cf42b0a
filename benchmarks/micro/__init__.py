"""Micro-benchmarks of the pure parts, the gate and the index: `python -m benchmarks.micro`."""
