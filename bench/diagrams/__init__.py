"""Diagrams of a step and of the kernels' tiles, drawn from the code they show: `python -m bench.diagrams`."""
