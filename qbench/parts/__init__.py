"""Variants that treat parts of a model differently: one part alone, or each with bits of its own."""
