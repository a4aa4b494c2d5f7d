"""The interface of a quantizer, and the arithmetic that methods share."""
