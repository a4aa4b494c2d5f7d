"""A quantized model as files: written, described, read back."""
