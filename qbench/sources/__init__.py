"""Where a model's weights and its tokenizer come from, and the fingerprint of its content."""
