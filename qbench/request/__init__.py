"""What was asked: one command line, checked as far as that goes without loading anything, and the point it means."""
