"""One walk over a model's blocks that serves all of its variants."""
