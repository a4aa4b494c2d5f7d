"""Many points: what a sweep expands to, where its points run, and what came of them."""
