"""The texts of `task=domains`, one file a kind; SOURCES.txt has their licence and hashes."""
