"""qbench compares weight quantizers of language models on equal terms. Start at `qbench.run`."""

import os.path

__version__ = "0.1.0"

# qbench.plugins and qbench.conf lie inside the package in a wheel, beside it in a checkout (qbench/checkout.py).
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "conf")):
    __path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
