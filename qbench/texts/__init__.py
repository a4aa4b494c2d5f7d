"""The texts that come with qbench: `mini` and `domains`, which are scored, `mini-calibration`, prompts for `self`."""
