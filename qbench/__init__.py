"""qbench compares weight quantizers of language models on equal terms. Start at `qbench.run`."""

__version__ = "0.1.0"
