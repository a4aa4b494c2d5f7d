"""Hydra configuration, found through the entry point `qbench.conf`."""
