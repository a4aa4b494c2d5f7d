"""How a quantized weight is stored: the interface of a format, and the built-in one. Imports nothing else of qbench."""
