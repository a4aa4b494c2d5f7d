"""Tests of qbench.readers."""
