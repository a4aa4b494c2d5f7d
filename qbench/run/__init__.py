"""From prepared points to recorded results: what a single command and the process of a sweep both call."""

from qbench.run.points import run_pass, run_point

__all__ = ["run_pass", "run_point"]
