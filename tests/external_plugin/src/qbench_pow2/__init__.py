"""Round to nearest with scales that are powers of two: a worked example of a third party's quantizer."""
