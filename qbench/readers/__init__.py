"""Files that others quantized: a reader recognizes one and gives every weight in it as a format."""
