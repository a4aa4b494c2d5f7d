"""The built-in quantizers: one method, one file, one frozen dataclass whose fields are its configuration."""
