"""One decoding step compiled by numba: CPU only, the extra `cpu`. Imported when it is first used.

`stack` is a whole step in one call. It is bound by reading the weights: each matrix is read once, four rows at a time,
whatever the number of sequences. Compiled once and then cached on disk.

`no_type_check` keeps the tests' shape checks, which wrap Python functions, away from what numba compiles.
"""

import math
from typing import no_type_check

import numpy as np
from numba import njit

F = np.float32
EPS = F(1e-5)
LOG2_HIGH = F(0.693145751953125)  # log 2 in 16 bits, whose product with an exponent is exact, and what is missing
LOG2_LOW = F(math.log(2) - 0.693145751953125)
# sums in any order, which is what vectors need, but NaN stays NaN
compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


@compiled
@no_type_check
def stack(
    modern, project_w, project_s, project_b, out_w, out_s, out_b, up_w, up_s, up_b, down_w, down_s, down_b,
    head_w, head_s, head_b, taps, decay, memory, normaliser, recent, x, normed, projected, attended, hidden, logits,
):  # fmt: skip
    """The logits from the embedded token `x`. Matrices are values, scale and bias; see `decoding.Matrix`."""
    for layer in range(len(memory)):
        normalise(modern, x, normed)
        multiply(project_w[layer], project_s[layer], project_b[layer], normed, projected, False)
        attend(modern, layer, projected, taps, decay, memory, normaliser, recent, attended)
        multiply(out_w[layer], out_s[layer], out_b[layer], attended, x, True)
        normalise(modern, x, normed)
        multiply(up_w[layer], up_s[layer], up_b[layer], normed, hidden, False)
        activate(modern, hidden)
        multiply(down_w[layer], down_s[layer], down_b[layer], hidden, x, True)
    normalise(modern, x, normed)
    multiply(head_w[0], head_s[0], head_b[0], normed, logits, False)


@compiled
@no_type_check
def multiply(values, scale, bias, x, out, add):
    """out = scale * (values x) + bias for each row of x, added to what is there if `add`."""
    rows, columns = values.shape
    blocks = rows // 4 * 4
    for o in range(0, blocks, 4):
        for b in range(len(x)):
            s0, s1, s2, s3 = F(0), F(0), F(0), F(0)
            for i in range(columns):
                xi = x[b, i]
                s0 += F(values[o, i]) * xi
                s1 += F(values[o + 1, i]) * xi
                s2 += F(values[o + 2, i]) * xi
                s3 += F(values[o + 3, i]) * xi
            before = out[b, o : o + 4]
            if not add:
                before[:] = 0
            before[0] += s0 * scale[o] + bias[o]
            before[1] += s1 * scale[o + 1] + bias[o + 1]
            before[2] += s2 * scale[o + 2] + bias[o + 2]
            before[3] += s3 * scale[o + 3] + bias[o + 3]
    for o in range(blocks, rows):
        for b in range(len(x)):
            total = F(0)
            for i in range(columns):
                total += F(values[o, i]) * x[b, i]
            out[b, o] = total * scale[o] + bias[o] + (out[b, o] if add else F(0))


@compiled
@no_type_check
def normalise(modern, x, out):
    columns = F(x.shape[1])
    for b in range(len(x)):
        mean, square = F(0), F(0)
        if not modern:
            for i in range(x.shape[1]):
                mean += x[b, i]
            mean /= columns
        for i in range(x.shape[1]):
            square += (x[b, i] - mean) ** 2
        factor = F(1) / np.sqrt(square / columns + EPS)
        for i in range(x.shape[1]):
            out[b, i] = (x[b, i] - mean) * factor


@compiled
@no_type_check
def attend(modern, layer, projected, taps, decay, memory, normaliser, recent, out):
    dim = out.shape[1]
    heads, width = normaliser.shape[2:]
    for b in range(len(out)):
        qkv = projected[b]
        if modern:
            _convolve(qkv[: 3 * dim], taps[layer], recent[layer, b])
            for part in range(2 * heads):
                _to_unit_rms(qkv[part * width : (part + 1) * width])
        for i in range(2 * dim):
            qkv[i] = max(qkv[i], F(0)) + _exp(min(qkv[i], F(0)))
        for h in range(heads):
            first = h * width
            y = out[b, first : first + width]
            value = qkv[2 * dim + first : 2 * dim + first + width]
            y[:] = 0
            weight = F(0)
            for e in range(width):
                query, key = qkv[first + e], qkv[dim + first + e]
                z = normaliser[layer, b, h, e] * decay[h] + key
                normaliser[layer, b, h, e] = z
                weight += query * z
                row = memory[layer, b, h, e]
                for m in range(width):
                    s = row[m] * decay[h] + key * value[m]
                    row[m] = s
                    y[m] += query * s
            for m in range(width):
                y[m] /= weight
            if modern:
                _to_unit_rms(y)
                for m in range(width):
                    gate = projected[b, 3 * dim + first + m]
                    small = _exp(-abs(gate))
                    y[m] *= gate * (F(1) if gate > 0 else small) / (F(1) + small)


@compiled
@no_type_check
def activate(modern, hidden):
    for b in range(len(hidden)):
        for i in range(hidden.shape[1]):
            positive = max(hidden[b, i], F(0))
            hidden[b, i] = positive * positive if modern else positive


@compiled
@no_type_check
def _convolve(qkv, taps, recent):
    """The causal convolution of the newest inputs, which move on by one, with the taps of each channel."""
    last = len(recent)
    oldest = recent[0]
    for i in range(len(qkv)):  # the oldest is not needed again: its place holds the sum
        oldest[i] *= taps[0, i]
    for t in range(1, last):
        for i in range(len(qkv)):
            oldest[i] += recent[t, i] * taps[t, i]
    for i in range(len(qkv)):
        newest = qkv[i]
        qkv[i] = oldest[i] + newest * taps[last, i]
        oldest[i] = newest
    for t in range(last - 1):  # what is newest goes from the front to the end
        for i in range(len(qkv)):
            recent[t, i], recent[t + 1, i] = recent[t + 1, i], recent[t, i]


@compiled
@no_type_check
def _to_unit_rms(x):
    square = F(0)
    for i in range(len(x)):
        square += x[i] * x[i]
    factor = F(1) / np.sqrt(square / F(len(x)) + EPS)
    for i in range(len(x)):
        x[i] *= factor


@compiled
@no_type_check
def _exp(x):
    """exp of a number that is not positive, within 5e-7 of itself; unlike numpy's, loops over it become vectors.

    exp(x) = 2^n exp(r) with r = x - n log 2 in [-log(2)/2, log(2)/2], n an integer: exp(r) is seven terms of its
    series, and 2^n a float32 with the exponent n. Below -87 it is exp(-87), some 1e-38.
    """
    x = max(x, F(-87))
    n = np.floor(x * F(1 / math.log(2)) + F(0.5))
    r = (x - n * LOG2_HIGH) - n * LOG2_LOW
    series = F(1 / 720)
    for factorial in (120, 24, 6, 2, 1, 1):
        series = series * r + F(1 / factorial)
    return series * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
