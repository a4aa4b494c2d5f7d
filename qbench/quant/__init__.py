"""The tensor format, the interface of a quantizer, and the layer that holds the result."""
