"""The operator behind `linear_attention`, and its kernels, in torch (every device) and numba (CPU).

Both files have the same two functions, `forward` and `backward`; `operator.py` makes one differentiable operator of
them.
"""
