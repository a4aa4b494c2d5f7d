"""Who is told of a result besides the store: experiment trackers."""
