"""The techniques inside the tools people use already; each file needs its own extra and says so."""
