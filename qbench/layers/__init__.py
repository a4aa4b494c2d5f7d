"""The layers that stand where linears and experts stood, and hold packed weights."""
