"""A worked example of a third party's package: one member of every kind, one file each."""
