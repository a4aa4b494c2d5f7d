"""Evaluation protocols. Each one is named, and its name is part of the metric's."""
