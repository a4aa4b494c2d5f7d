"""What a point leaves behind: its identity, the result's schema, the store and its locks. No torch here."""
