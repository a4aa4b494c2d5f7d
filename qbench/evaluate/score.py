"""The NLL of every token of every window, in fp32 or wider, without ever holding fp32 logits of a whole window.

A forward pass gives logits `[windows, tokens, vocabulary]` in the model's dtype; in 16 bit their log-softmax alone
would move a perplexity by up to 0.1 %. So they are widened, CHUNK_BYTES at a time. Peak memory beside the model's own
forward pass: its logits in its dtype, and two to three chunks (wide logits, their exponentials, a work copy). For one
window of 2048 tokens and a vocabulary of 150k in bfloat16 that is 0.6 GB and 0.1 GB; a log-softmax of the whole window
in fp32, as lm-eval's model layer does it, takes another 1.2 GB for every tensor it makes.

Scoring equals HFLM's `_loglikelihood_tokens` with the first token as context (tests/evaluate/test_score.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qbench.errors import PointError

CHUNK_BYTES = 32 * 2**20

# called with the window's index, the rows of it, their log-probabilities' logits `[rows, vocabulary]` in fp32 or
# wider, and the logarithm of their softmax's denominator `[rows]`
Watcher = Callable[[int, slice, Tensor, Tensor], None]


@torch.inference_mode()
def token_nll(model: Any, ids: np.ndarray, batch_size: int, label: str, watch: Watcher | None = None) -> np.ndarray:
    """NLL in nats of each scored token, `[windows, window_tokens - 1]`, fp32 (fp64 for a model in fp64).

    `ids` is int64 `[windows, window_tokens]`. Raises PointError, naming window and layer, when there is NaN or Inf.
    """
    rows: list[np.ndarray] = []
    with tqdm(total=len(ids), desc=label, unit="window") as progress:
        for start in range(0, len(ids), batch_size):
            batch = torch.from_numpy(ids[start : start + batch_size]).to(model.device)
            logits = model(batch[:, :-1], use_cache=False).logits
            for offset in range(len(batch)):
                index = start + offset
                nll = _window_nll(index, logits[offset], batch[offset, 1:], watch)
                if not np.isfinite(nll).all():
                    raise PointError(f"{label}: {_describe_nonfinite(model, batch[offset], index, nll)}")
                rows.append(nll)
            del logits  # before the next batch's are made
            progress.update(len(batch))
    return np.stack(rows)


def _window_nll(index: int, logits: Tensor, targets: Tensor, watch: Watcher | None) -> np.ndarray:
    """logits `[tokens, vocabulary]`, targets `[tokens]` -> NLL `[tokens]`.

    What is not finite ends with its chunk: a watcher samples from the softmax, which has to be one.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    step = max(1, CHUNK_BYTES // (wide.itemsize * logits.shape[-1]))
    nll = []
    for first in range(0, len(logits), step):
        rows = slice(first, min(first + step, len(logits)))
        chunk = logits[rows].to(wide)
        denominator = chunk.logsumexp(-1)
        nll.append(denominator - chunk.gather(1, targets[rows, None])[:, 0])
        if watch is not None:
            if not torch.isfinite(nll[-1]).all():
                break
            watch(index, rows, chunk, denominator)
    return torch.cat(nll).cpu().numpy()


def _describe_nonfinite(model: Any, ids: Tensor, index: int, nll: np.ndarray) -> str:
    token = int(np.argmin(np.isfinite(nll)))
    layer = first_nonfinite_layer(model, ids[None, :-1])
    where = f"first in the output of {layer}" if layer else "but not when it is run again alone"
    return f"the model gives NaN or Inf in window {index} from token {token}, {where}"


def first_nonfinite_layer(model: Any, ids: Tensor) -> str | None:
    """The first module, in the order in which they finish, whose output holds NaN or Inf; None if all are finite."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(
                isinstance(t, Tensor) and t.is_floating_point() and not torch.isfinite(t).all() for t in tensors
            ):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
