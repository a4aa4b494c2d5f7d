"""Which linears read the same tensor, observed with no text: for methods that quantize a linear group as one.

A few tokens are sent through each block as it comes, from the states in front of the first one: what the tensors hold
does not matter, only which of them each linear is handed (shown.py does the same with the calibration text).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qbench.errors import PointError
from qbench.model.blocks import NotAChainError
from qbench.model.linears import find_linears
from qbench.passes.chain import Chain
from qbench.passes.shown import Group, Reading, hooks

TOKENS = 32  # routed experts that are modules of their own should be reached by some


class Groups:
    """The linear groups of one block after the other, in their order.

    Raises NotAChainError when the chain does not hold for the tokens.
    """

    def __init__(self, chain: Chain) -> None:
        ids = torch.arange(TOKENS, device=chain.model.device)[None] % chain.model.config.get_text_config().vocab_size
        self.states, self.calls = chain.begin(ids)

    @torch.no_grad()
    def of(self, i: int, block: nn.Module, layers: dict[str, nn.Module]) -> list[Group]:
        """The linears of block `i`, which are given by name, group by group; one that no token reaches is its own."""
        reading = Reading(layers)
        with hooks([(layer, reading.of(name)) for name, layer in layers.items()]):
            self.calls[i].run(block, self.states.clone())
        return reading.groups + [{name: layer} for name, layer in layers.items() if name not in reading.place]


def groups_of(model: Any, offloaded: bool = False) -> list[list[str]]:
    """The names of each linear group of a model that is there as a whole.

    Raises PointError where they cannot be observed.
    """
    reason = "its weights are in host memory (runtime.offload=false holds them on the device)" if offloaded else None
    if reason is None:
        try:
            chain = Chain.of(model.eval(), resident=True)
            groups, layers = Groups(chain), find_linears(model).layers
            return [
                list(group)
                for i, block in enumerate(chain.blocks)
                for group in groups.of(
                    i, block, {n: m for n, m in layers.items() if n.startswith(f"{chain.name}.{i}.")}
                )
            ]
        except NotAChainError as error:
            reason = str(error)
    raise PointError(f"which linears read the same tensor cannot be observed: {reason}; quantize them one by one")
