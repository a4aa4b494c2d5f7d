"""Where a pass gets its weights from: what lies outside of the blocks at once, and one block at a time."""
