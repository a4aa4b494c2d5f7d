"""The texts that come with qbench: `mini`, which is scored, and `mini-calibration`."""
