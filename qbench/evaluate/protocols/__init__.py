"""The built-in protocols, one a file; each is registered in pyproject.toml as a third party's is."""
