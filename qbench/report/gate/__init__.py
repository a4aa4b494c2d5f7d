"""The regression gate: the committed gate file, its comparison with what is recorded, and how the verdict is told."""
