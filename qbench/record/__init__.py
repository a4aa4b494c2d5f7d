"""What a point leaves behind: the result schema, the store, the trackers. No torch here."""
