"""transformers' model code, without what it imports only because it is installed and no language model runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

# transformers asks at its import whether they are installed: assisted decoding draws a curve with scikit-learn, which
# imports scipy and pandas, and the losses of object detection read torchvision. Together they take seconds.
NOT_RUN = ("sklearn", "torchvision", "torchaudio")


def model_code() -> None:
    """Imports what every model of a language needs of transformers; seconds the first time, then nothing.

    A program that has imported one of `NOT_RUN` before keeps it.
    """
    with _hidden(*NOT_RUN):
        import_module("transformers.core_model_loading")
        import_module("transformers.models.auto.modeling_auto")
        import_module("transformers.modeling_layers")


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """While it lasts, the modules of these names cannot be imported, nor be found; those that are here stay."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
