"""What is done to a loaded model block by block: calibrating and quantizing it."""
