"""The tasks of `task=questions`, in lm-eval's YAML, with their documents; SOURCES.txt has their licence and hashes."""
