"""One decoding step of a layer, in torch (every device) and numba (CPU), with the same functions in both files.

- `normalise(modern, x, out)`: LayerNorm or RMSNorm without factors
- `attend(modern, projected, taps, decay, memory, normaliser, recent, out)`: all of attention between its two matrices
- `activate(modern, hidden)`: relu, or its square

`numba.py` has `stack` besides: all layers of a step in one call.
"""
