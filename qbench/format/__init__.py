"""How a quantized weight is stored: codes, scales and zero points, packed. Imports nothing else of qbench."""
