"""One file per claim of the thesis: each runs the technique and its honest baseline and writes records."""
