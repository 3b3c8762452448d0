"""The compiled loops behind `numba.py`, which alone imports this file, and only to run them.

A row is a text and a key head, with the query heads that read it; every loop works on rows start..stop, so that threads
can share them. Tensors come as `(numbers, text stride, head stride, position stride)`: flat, so that no input need be
copied to be contiguous. Within a row the sequence is worked on in chunks; all that a chunk needs fits the first- and
second-level cache, padded with zeros to whole vectors: width e to E, value width m to M, count positions to CHUNK.
References to arrays are not counted within a chunk, each time a fence in memory: arrays are taken out of their tuples
once, and functions that call several others are `uncounted`.
`no_type_check` keeps the tests' shape checks, which wrap Python functions, away from what numba compiles.
"""

from typing import Any, no_type_check

import numpy as np
from numba import njit

from flopwise.linear_attention.kernels.numba import CHUNK
from flopwise.linear_attention.kernels.numba_vectors import (
    LANES,
    TILE,
    add_scaled_vector,
    address,
    dot_vectors,
    elu_vector,
    multiply_vector,
    one_row,
    one_vector,
    prefetch,
    scale_vector,
    through_elu_vector,
    transpose_block,
    two_vectors,
)

# Reassociation and contraction make loops vectorise; not "nnan" and "ninf": nan must show.
fast: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "arcp", "nsz"}}
compiled = njit(nogil=True, cache=True, **fast)
uncounted = njit(nogil=True, cache=True, _nrt=False, **fast)  # numba's own way to count no references to arrays
exactly = njit(nogil=True, cache=True, error_model="numpy")


@compiled
@no_type_check
def new_queue(E, M):
    """Room for `fetch`: the next entry, the first free one; then entries, an address and a distance in bytes."""
    queue = np.zeros(2 + 2 * 16 * (-(-E // 64) + -(-M // 64)), np.int64)
    queue[:2] = 1
    return queue


@compiled
@no_type_check
def fetch(queue, x, at, width):
    """Queue a chunk's rows x[at + i stride : ... + width], to be brought nearer while products are computed.

    In a burst they would block what else is read, so every tile of a product fetches 16 lines, in the order of memory,
    in which the processor fetches some of them by itself.
    """
    stride = x[3]
    if stride == width:
        for e in range(0, CHUNK * width, 256):
            enqueue(queue, address(x[0], at + e), 256)
    else:
        for e in range(0, width, 64):
            for i in range(0, CHUNK, 4):
                enqueue(queue, address(x[0], at + i * stride + e), 4 * stride)


@compiled
@no_type_check
def enqueue(queue, place, distance):
    free = queue[1]
    if queue[0] == free or 2 * free == len(queue):  # nothing is left, or no room: what is left is given up
        queue[0] = free = 1
    queue[2 * free], queue[2 * free + 1] = place, distance
    queue[1] = free + 1


@compiled
@no_type_check
def fetch_next(queue):
    """Fetch an entry of the queue, if one is left."""
    next = queue[0]
    if next < queue[1]:
        prefetch(queue[2 * next], queue[2 * next + 1])
        queue[0] = next + 1


@compiled
@no_type_check
def add_product(out, a, b, add, queue):
    """out = a @ b, plus out if `add`."""
    inner, columns = b.shape
    for m in range(0, columns, 2 * LANES):
        if m + LANES < columns:
            for i in range(0, len(out), TILE):
                at = i * columns + m
                fetch_next(queue)
                two_vectors(a, i * inner, inner, 1, b, m, columns, inner, out, at, columns, add)
        else:
            for i in range(0, len(out), 2 * TILE):
                at = i * columns + m
                fetch_next(queue)
                one_vector(a, i * inner, inner, 1, b, m, columns, inner, out, at, columns, add)


@compiled
@no_type_check
def add_transposed_product(out, a, b, add, queue):
    """out = a^T @ b."""
    (rows, columns), inner = out.shape, len(b)
    for m in range(0, columns, 2 * LANES):
        if m + LANES < columns:
            for i in range(0, rows, TILE):
                at = i * columns + m
                fetch_next(queue)
                two_vectors(a, i, 1, rows, b, m, columns, inner, out, at, columns, add)
        else:
            for i in range(0, rows, 2 * TILE):
                at = i * columns + m
                fetch_next(queue)
                one_vector(a, i, 1, rows, b, m, columns, inner, out, at, columns, add)


@compiled
@no_type_check
def add_product_past(out, a, b, queue):
    """out += a @ b for a lower triangular `a` (CHUNK, CHUNK)."""
    columns = b.shape[1]
    for m in range(0, columns, 2 * LANES):
        if m + LANES < columns:
            for i in range(0, CHUNK, TILE):
                at = i * columns + m
                fetch_next(queue)
                two_vectors(a, i * CHUNK, CHUNK, 1, b, m, columns, i + TILE, out, at, columns, True)
        else:
            for i in range(0, CHUNK, 2 * TILE):
                at = i * columns + m
                fetch_next(queue)
                one_vector(a, i * CHUNK, CHUNK, 1, b, m, columns, i + 2 * TILE, out, at, columns, True)


@compiled
@no_type_check
def add_product_future(out, a, b, queue):
    """out += a^T @ b for a lower triangular `a` (CHUNK, CHUNK)."""
    columns = b.shape[1]
    for m in range(0, columns, 2 * LANES):
        if m + LANES < columns:
            for i in range(0, CHUNK, TILE):
                at, first = i * columns + m, i * CHUNK + i
                fetch_next(queue)
                two_vectors(a, first, 1, CHUNK, b, at, columns, CHUNK - i, out, at, columns, True)
        else:
            for i in range(0, CHUNK, 2 * TILE):
                at, first = i * columns + m, i * CHUNK + i
                fetch_next(queue)
                one_vector(a, first, 1, CHUNK, b, at, columns, CHUNK - i, out, at, columns, True)


@compiled
@no_type_check
def transpose(x, out):
    """out = x^T."""
    rows, columns = x.shape
    for i in range(0, rows, LANES):
        for j in range(0, columns, LANES):
            transpose_block(x, i * columns + j, columns, out, j * rows + i, rows)


@exactly
@no_type_check
def load(x, at, stride, count, width, factors, out):
    """Rows x[at + i stride : ... + width] of a chunk, times factors[0, i], into out (CHUNK, padded width)."""
    whole = width - width % LANES
    for i in range(count):
        for e in range(0, whole, LANES):
            scale_vector(factors[0, i], x, at + i * stride + e, out, i * out.shape[1] + e)
        for e in range(whole, width):
            out[i, e] = factors[0, i] * x[at + i * stride + e]
    for i in range(count, len(out)):
        for e in range(out.shape[1]):
            out[i, e] = 0


@exactly
@no_type_check
def load_elu(x, at, stride, count, width, out):
    """elu + 1 of a chunk's rows; what is padded has features 0."""
    whole = width - width % LANES
    for i in range(count):
        for e in range(0, whole, LANES):
            elu_vector(x, at + i * stride + e, out, i * out.shape[1] + e)
        if whole < width:
            for e in range(whole, whole + LANES):
                out[i, e] = x[at + i * stride + e] if e < width else -np.inf
            elu_vector(out, i * out.shape[1] + whole, out, i * out.shape[1] + whole)
    for i in range(count, len(out)):
        for e in range(out.shape[1]):
            out[i, e] = 0


@uncounted
@no_type_check
def load_features(x, at, stride, count, width, ones, out, use_elu):
    """phi of a chunk's rows."""
    if use_elu:
        load_elu(x, at, stride, count, width, out)
    else:
        load(x, at, stride, count, width, ones, out)


@compiled
@no_type_check
def matrix(rows, columns):
    """Zeros that begin at a cache line: a vector that straddles two of them is read twice."""
    numbers = np.zeros(rows * columns + 16, np.float32)
    begin = -(numbers.ctypes.data // 4) % 16
    return numbers[begin : begin + rows * columns].reshape(rows, columns)


@compiled
@no_type_check
def padded(width):
    """The next multiple of CHUNK, and so of LANES and 2 TILE."""
    return -(-width // CHUNK) * CHUNK


@compiled
@no_type_check
def place(x, text, head, position):
    """Where in its numbers a tensor has this position."""
    return text * x[1] + head * x[2] + position * x[3]


@compiled
@no_type_check
def heads_of(group, query):
    """The query heads that read key head `group`."""
    per_group = query[4]
    return range(group * per_group, (group + 1) * per_group)


@compiled
@no_type_check
def powers_of(decay, powers, past):
    """powers[i] = decay^i, and past[i, j] = decay^(i - j) for j <= i, otherwise 0."""
    powers[0, 0] = 1
    for i in range(CHUNK):
        powers[0, i + 1] = powers[0, i] * decay
    for i in range(CHUNK):
        for j in range(i + 1):
            past[i, j] = powers[0, i - j]


@compiled
@no_type_check
def weigh(x, powers, first, step, count, out):
    """out[i] = powers[first + step i] x[i]; rows from count on are 0 in x, and in out."""
    for i in range(len(x)):
        factor = powers[0, first + step * i] if i < count else np.float32(0)
        for e in range(x.shape[1]):
            out[i, e] = factor * x[i, e]


@compiled
@no_type_check
def multiply(x, y):
    """x *= y."""
    for at in range(0, x.size, LANES):
        multiply_vector(x, at, y, at, x, at)


@exactly
@no_type_check
def store(x, factors, out, at, stride, count, width):
    """The reverse of `load`, with row i times factors[0, i]."""
    whole = width - width % LANES
    for i in range(count):
        for e in range(0, whole, LANES):
            scale_vector(factors[0, i], x, i * x.shape[1] + e, out, at + i * stride + e)
        for e in range(whole, width):
            out[at + i * stride + e] = factors[0, i] * x[i, e]


@compiled
@no_type_check
def load_state(memory, text, group, state):
    """memory[text, group], padded."""
    state[:] = 0
    for e in range(memory.shape[2]):
        for m in range(memory.shape[3]):
            state[e, m] = memory[text, group, e, m]


@compiled
@no_type_check
def store_state(state, memory, text, group):
    """The reverse of `load_state`."""
    for e in range(memory.shape[2]):
        for m in range(memory.shape[3]):
            memory[text, group, e, m] = state[e, m]


@compiled
@no_type_check
def dot_rows(x, y, y_stride, out):
    """out[0, i] = x[i] . y[i y_stride : ...]."""
    columns = x.shape[1]
    for i in range(0, CHUNK, LANES):
        dot_vectors(x, i * columns, columns, y, i * y_stride, y_stride, columns, out, i)


@compiled
@no_type_check
def shrink(x, factor):
    """x *= factor."""
    for i in range(len(x)):
        for j in range(x.shape[1]):
            x[i, j] *= factor


@compiled
@no_type_check
def add_weighted_rows(numbers, x, out):
    """out[0] += sum_i numbers[i] x[i], of a chunk."""
    columns = x.shape[1]
    for e in range(0, columns, LANES):
        one_row(numbers, 0, 0, 1, x, e, columns, CHUNK, out, e, columns, True)


@compiled
@no_type_check
def invert(x):
    """1 / x, and 0 for 0, in place."""
    for i in range(CHUNK):
        x[0, i] = np.float32(0) if x[0, i] == 0 else np.float32(1) / x[0, i]


@uncounted
@no_type_check
def write_output(product, total, out, at, stride, denominator, denominator_at, count, value_width):
    """Numerators over denominators of a chunk into the output, and the denominators."""
    for i in range(count):
        denominator[denominator_at + i] = total[0, i]
    invert(total)
    store(product, total, out, at, stride, count, value_width)


@uncounted
@no_type_check
def read_gradient(grad, at, stride, denominator, denominator_at, count, value_width, g, inverse):
    """g = grad / denominator, of a chunk."""
    for i in range(CHUNK):
        inverse[0, i] = denominator[denominator_at + i] if i < count else np.float32(0)
    invert(inverse)
    load(grad, at, stride, count, value_width, inverse, g)


@compiled
@no_type_check
def add_outer(numbers, x, out):
    """out[i] += numbers[i] x[0]."""
    columns = x.shape[1]
    for i in range(CHUNK):
        for e in range(0, columns, LANES):
            add_scaled_vector(numbers[i], x, e, out, i * columns + e)


@compiled
@no_type_check
def through_elu(grad, features):
    """The gradient of x from that of its features elu(x) + 1, in place: the derivative is min(features, 1)."""
    for at in range(0, grad.size, LANES):
        through_elu_vector(grad, at, features, at, grad, at)


@compiled
@no_type_check
def causal_forward(
    start, stop, bounds, _, query, key, value, decay, memory, normaliser, use_elu,
    out, denominator, last_memory, last_normaliser,
):  # fmt: skip
    """`kernels.torch.forward` of causal attention: out_i = past (q k^T) v + q S, and S takes in the chunk."""
    _, groups, width, value_width = memory.shape
    keys, values, queries, outputs, denominators = key[0], value[0], query[0], out[0], denominator[0]
    E, M, decays = padded(width), padded(value_width), len(decay) > 0
    q, k, v, k_t = matrix(CHUNK, E), matrix(CHUNK, E), matrix(CHUNK, M), matrix(E, CHUNK)
    q_scaled, k_scaled = (matrix(CHUNK, E), matrix(CHUNK, E)) if decays else (q, k)
    attention, past, powers = matrix(CHUNK, CHUNK), matrix(CHUNK, CHUNK), matrix(1, CHUNK + 1)
    product, S, z = matrix(CHUNK, M), matrix(E, M), matrix(1, E)
    total, within_chunk, ones, queue = matrix(1, CHUNK), matrix(1, CHUNK), matrix(1, CHUNK), new_queue(E, M)
    ones[:] = 1
    powers_of(np.float32(1), powers, past)
    for row in range(start, stop):
        text, group = row // groups, row % groups
        begin, end = bounds[text, 0], bounds[text, 1]
        load_state(memory, text, group, S)
        z[0, :width] = normaliser[text, group]
        if decays:
            powers_of(decay[text, group], powers, past)
        for first in range(begin, end, CHUNK):
            count = min(CHUNK, end - first)
            load_features(keys, place(key, text, group, first), key[3], count, width, ones, k, use_elu)
            load(values, place(value, text, group, first), value[3], count, value_width, ones, v)
            transpose(k, k_t)
            fetch(queue, key, place(key, text, group, first + CHUNK), width)
            fetch(queue, value, place(value, text, group, first + CHUNK), value_width)
            for head in heads_of(group, query):
                load_features(queries, place(query, text, head, first), query[3], count, width, ones, q, use_elu)
                fetch(queue, query, place(query, text, head, first + CHUNK), width)
                fetch(queue, out, place(out, text, head, first + CHUNK), value_width)
                add_product(attention, q, k_t, False, queue)
                multiply(attention, past)
                if decays:
                    weigh(q, powers, 1, 1, count, q_scaled)
                add_product(product, q_scaled, S, False, queue)
                add_product_past(product, attention, v, queue)
                dot_rows(q_scaled, z, 0, total)
                dot_rows(attention, ones, 0, within_chunk)
                for i in range(CHUNK):
                    total[0, i] += within_chunk[0, i]
                at, of_denominator = place(out, text, head, first), place(denominator, text, head, first)
                write_output(product, total, outputs, at, out[3], denominators, of_denominator, count, value_width)
            if decays:
                weigh(k, powers, count - 1, -1, count, k_scaled)
                shrink(S, powers[0, count])
                shrink(z, powers[0, count])
            add_transposed_product(S, k_scaled, v, True, queue)
            add_weighted_rows(ones, k_scaled, z)
        store_state(S, last_memory, text, group)
        last_normaliser[text, group] = z[0, :width]


@compiled
@no_type_check
def causal_backward(
    start, stop, bounds, _, query, key, value, decay, memory, normaliser, use_elu,
    out, denominator, last_memory, last_normaliser, grad_out, grad_last_memory, grad_last_normaliser,
    grad_query, grad_key, grad_value, grad_memory, grad_normaliser,
):  # fmt: skip
    """`kernels.torch.backward` of causal attention: forwards in time for the query, backwards for key and value.

    g' = [g, share]: `g` is grad_out / d and `share`, -(g . y), stands for the denominator's column of ones.
    """
    _, groups, width, value_width = memory.shape
    keys, values, queries, outputs = key[0], value[0], query[0], out[0]
    grad_queries, grad_keys, grad_values = grad_query[0], grad_key[0], grad_value[0]
    denominators, grad_outs = denominator[0], grad_out[0]
    E, M, decays = padded(width), padded(value_width), len(decay) > 0
    q, k, k_t = matrix(CHUNK, E), matrix(CHUNK, E), matrix(E, CHUNK)
    g, v, v_t, y = matrix(CHUNK, M), matrix(CHUNK, M), matrix(M, CHUNK), matrix(CHUNK, M)
    q_scaled, k_scaled = (matrix(CHUNK, E), matrix(CHUNK, E)) if decays else (q, k)
    g_scaled, v_scaled = (matrix(CHUNK, M), matrix(CHUNK, M)) if decays else (g, v)
    v_t_scaled = matrix(M, CHUNK) if decays else v_t
    attention, grad_attention = matrix(CHUNK, CHUNK), matrix(CHUNK, CHUNK)
    past, powers = matrix(CHUNK, CHUNK), matrix(1, CHUNK + 1)
    grad_e, grad_t, grad_m = matrix(CHUNK, E), matrix(E, CHUNK), matrix(CHUNK, M)
    state, state_t = matrix(E, M), matrix(M, E)
    z, r, inverse, ones = matrix(1, E), matrix(1, E), matrix(1, CHUNK), matrix(1, CHUNK)
    weights = np.ones(CHUNK, np.float32)
    total, queue = matrix(1, CHUNK), new_queue(E, M)
    shares = np.zeros((query[4], (bounds[:, 1] - bounds[:, 0]).max() + CHUNK), np.float32)
    ones[:] = 1
    powers_of(np.float32(1), powers, past)
    for row in range(start, stop):
        text, group = row // groups, row % groups
        begin, end = bounds[text, 0], bounds[text, 1]
        if decays:
            powers_of(decay[text, group], powers, past)

        load_state(memory, text, group, state)
        transpose(state, state_t)  # S^T
        z[0, :width] = normaliser[text, group]
        for first in range(begin, end, CHUNK):
            count = min(CHUNK, end - first)
            load_features(keys, place(key, text, group, first), key[3], count, width, ones, k, use_elu)
            load(values, place(value, text, group, first), value[3], count, value_width, ones, v)
            transpose(v, v_t)
            fetch(queue, key, place(key, text, group, first + CHUNK), width)
            fetch(queue, value, place(value, text, group, first + CHUNK), value_width)
            for head in heads_of(group, query):
                fetch(queue, grad_out, place(grad_out, text, head, first + CHUNK), value_width)
                fetch(queue, out, place(out, text, head, first + CHUNK), value_width)
                fetch(queue, query, place(query, text, head, first + CHUNK), width)
                fetch(queue, grad_query, place(grad_query, text, head, first + CHUNK), width)
                share = shares[head % len(shares), first - begin : first - begin + CHUNK]
                at, of_denominator = place(grad_out, text, head, first), place(denominator, text, head, first)
                read_gradient(grad_outs, at, grad_out[3], denominators, of_denominator, count, value_width, g, inverse)
                load(outputs, place(out, text, head, first), out[3], count, value_width, ones, y)
                dot_rows(g, y, M, total)
                for i in range(CHUNK):
                    share[i] = -total[0, i]
                add_product(grad_attention, g, v_t, False, queue)
                add_outer(share, ones, grad_attention)
                multiply(grad_attention, past)
                if decays:
                    weigh(g, powers, 1, 1, count, g_scaled)
                    for i in range(CHUNK):
                        weights[i] = powers[0, i + 1]
                for i in range(CHUNK):
                    total[0, i] = share[i] * weights[i]
                add_product(grad_e, g_scaled, state_t, False, queue)
                add_outer(total[0], z, grad_e)
                add_product_past(grad_e, grad_attention, k, queue)
                if use_elu:
                    load_features(queries, place(query, text, head, first), query[3], count, width, ones, q, use_elu)
                    through_elu(grad_e, q)
                store(grad_e, ones, grad_queries, place(grad_query, text, head, first), width, count, width)
            if decays:
                weigh(k, powers, count - 1, -1, count, k_scaled)
                shrink(state_t, powers[0, count])
                shrink(z, powers[0, count])
            add_transposed_product(state_t, v, k_scaled, True, queue)
            add_weighted_rows(ones, k_scaled, z)

        load_state(grad_last_memory, text, group, state)  # R
        z[0, :width] = grad_last_normaliser[text, group]
        for chunk in range((end - begin - 1) // CHUNK, -1, -1):
            first = begin + chunk * CHUNK
            count = min(CHUNK, end - first)
            load_features(keys, place(key, text, group, first), key[3], count, width, ones, k, use_elu)
            load(values, place(value, text, group, first), value[3], count, value_width, ones, v)
            transpose(k, k_t)
            transpose(v, v_t)
            if decays:
                weigh(k, powers, count - 1, -1, count, k_scaled)
                weigh(v, powers, count - 1, -1, count, v_scaled)
                transpose(v_scaled, v_t_scaled)
                for j in range(CHUNK):
                    weights[j] = powers[0, max(count - 1 - j, 0)]
            before = first - CHUNK
            fetch(queue, key, place(key, text, group, before), width)
            fetch(queue, value, place(value, text, group, before), value_width)
            fetch(queue, grad_key, place(grad_key, text, group, before), width)
            fetch(queue, grad_value, place(grad_value, text, group, before), value_width)
            # d phi(k)^T = R v^T and not d phi(k) = v R^T, which would take R^T from the cache as well
            add_product(grad_t, state, v_t_scaled, False, queue)
            add_product(grad_m, k_scaled, state, False, queue)
            r[:] = z
            if decays:
                shrink(state, powers[0, count])
                shrink(z, powers[0, count])
            for head in heads_of(group, query):
                share = shares[head % len(shares), first - begin : first - begin + CHUNK]
                load_features(queries, place(query, text, head, first), query[3], count, width, ones, q, use_elu)
                at, of_denominator = place(grad_out, text, head, first), place(denominator, text, head, first)
                read_gradient(grad_outs, at, grad_out[3], denominators, of_denominator, count, value_width, g, inverse)
                add_product(attention, q, k_t, False, queue)
                multiply(attention, past)
                add_product(grad_attention, g, v_t, False, queue)
                add_outer(share, ones, grad_attention)
                multiply(grad_attention, past)
                add_transposed_product(grad_t, q, grad_attention, True, queue)
                add_product_future(grad_m, attention, g, queue)
                if decays:
                    weigh(q, powers, 1, 1, count, q_scaled)
                fetch(queue, query, place(query, text, head, before), width)
                fetch(queue, grad_out, place(grad_out, text, head, before), value_width)
                add_transposed_product(state, q_scaled, g, True, queue)
                add_weighted_rows(share, q_scaled, z)
            transpose(grad_t, grad_e)
            add_outer(weights, r, grad_e)
            if use_elu:
                through_elu(grad_e, k)
            store(grad_e, ones, grad_keys, place(grad_key, text, group, first), width, count, width)
            store(grad_m, ones, grad_values, place(grad_value, text, group, first), value_width, count, value_width)
        store_state(state, grad_memory, text, group)
        grad_normaliser[text, group] = z[0, :width]


@compiled
@no_type_check
def full_forward(
    start, stop, bounds, key_bounds, query, key, value, decay, memory, normaliser, use_elu,
    out, denominator, last_memory, last_normaliser,
):  # fmt: skip
    """`kernels.torch.forward` of attention to all keys: S first, then q S."""
    _, groups, width, value_width = memory.shape
    keys, values, queries, outputs, denominators = key[0], value[0], query[0], out[0], denominator[0]
    E, M = padded(width), padded(value_width)
    q, k, v = matrix(CHUNK, E), matrix(CHUNK, E), matrix(CHUNK, M)
    product, S, z, total = matrix(CHUNK, M), matrix(E, M), matrix(1, E), matrix(1, CHUNK)
    ones, queue = matrix(1, CHUNK), new_queue(E, M)
    ones[:] = 1
    for row in range(start, stop):
        text, group = row // groups, row % groups
        load_state(memory, text, group, S)
        z[0, :width] = normaliser[text, group]
        for first in range(key_bounds[text, 0], key_bounds[text, 1], CHUNK):
            count = min(CHUNK, key_bounds[text, 1] - first)
            load_features(keys, place(key, text, group, first), key[3], count, width, ones, k, use_elu)
            load(values, place(value, text, group, first), value[3], count, value_width, ones, v)
            fetch(queue, key, place(key, text, group, first + CHUNK), width)
            fetch(queue, value, place(value, text, group, first + CHUNK), value_width)
            add_transposed_product(S, k, v, True, queue)
            add_weighted_rows(ones, k, z)
        for head in heads_of(group, query):
            for first in range(bounds[text, 0], bounds[text, 1], CHUNK):
                count = min(CHUNK, bounds[text, 1] - first)
                load_features(queries, place(query, text, head, first), query[3], count, width, ones, q, use_elu)
                fetch(queue, query, place(query, text, head, first + CHUNK), width)
                fetch(queue, out, place(out, text, head, first + CHUNK), value_width)
                add_product(product, q, S, False, queue)
                dot_rows(q, z, 0, total)
                at, of_denominator = place(out, text, head, first), place(denominator, text, head, first)
                write_output(product, total, outputs, at, out[3], denominators, of_denominator, count, value_width)
        store_state(S, last_memory, text, group)
        last_normaliser[text, group] = z[0, :width]


@compiled
@no_type_check
def full_backward(
    start, stop, bounds, key_bounds, query, key, value, decay, memory, normaliser, use_elu,
    out, denominator, last_memory, last_normaliser, grad_out, grad_last_memory, grad_last_normaliser,
    grad_query, grad_key, grad_value, grad_memory, grad_normaliser,
):  # fmt: skip
    """`kernels.torch.backward` of attention to all keys: over the queries, which give R, then over the keys."""
    _, groups, width, value_width = memory.shape
    keys, values, queries, outputs = key[0], value[0], query[0], out[0]
    grad_queries, grad_keys, grad_values = grad_query[0], grad_key[0], grad_value[0]
    denominators, grad_outs = denominator[0], grad_out[0]
    E, M = padded(width), padded(value_width)
    q, k, g, v, y = matrix(CHUNK, E), matrix(CHUNK, E), matrix(CHUNK, M), matrix(CHUNK, M), matrix(CHUNK, M)
    grad_e, grad_m = matrix(CHUNK, E), matrix(CHUNK, M)
    S, S_t, R, R_t = matrix(E, M), matrix(M, E), matrix(E, M), matrix(M, E)
    z, r, inverse, total = matrix(1, E), matrix(1, E), matrix(1, CHUNK), matrix(1, CHUNK)
    ones, queue = matrix(1, CHUNK), new_queue(E, M)
    ones[:] = 1
    for row in range(start, stop):
        text, group = row // groups, row % groups
        load_state(last_memory, text, group, S)
        z[0, :width] = last_normaliser[text, group]
        load_state(grad_last_memory, text, group, R)
        r[0, :width] = grad_last_normaliser[text, group]
        transpose(S, S_t)
        for head in heads_of(group, query):
            for first in range(bounds[text, 0], bounds[text, 1], CHUNK):
                count = min(CHUNK, bounds[text, 1] - first)
                load_features(queries, place(query, text, head, first), query[3], count, width, ones, q, use_elu)
                at, of_denominator = place(grad_out, text, head, first), place(denominator, text, head, first)
                read_gradient(grad_outs, at, grad_out[3], denominators, of_denominator, count, value_width, g, inverse)
                load(outputs, place(out, text, head, first), out[3], count, value_width, ones, y)
                dot_rows(g, y, M, total)
                shrink(total, np.float32(-1))  # the share of the denominator
                fetch(queue, query, place(query, text, head, first + CHUNK), width)
                fetch(queue, grad_out, place(grad_out, text, head, first + CHUNK), value_width)
                fetch(queue, out, place(out, text, head, first + CHUNK), value_width)
                fetch(queue, grad_query, place(grad_query, text, head, first + CHUNK), width)
                add_product(grad_e, g, S_t, False, queue)
                add_outer(total[0], z, grad_e)
                add_transposed_product(R, q, g, True, queue)
                add_weighted_rows(total, q, r)
                if use_elu:
                    through_elu(grad_e, q)
                store(grad_e, ones, grad_queries, place(grad_query, text, head, first), width, count, width)
        transpose(R, R_t)
        for first in range(key_bounds[text, 0], key_bounds[text, 1], CHUNK):
            count = min(CHUNK, key_bounds[text, 1] - first)
            load_features(keys, place(key, text, group, first), key[3], count, width, ones, k, use_elu)
            load(values, place(value, text, group, first), value[3], count, value_width, ones, v)
            fetch(queue, key, place(key, text, group, first + CHUNK), width)
            fetch(queue, value, place(value, text, group, first + CHUNK), value_width)
            fetch(queue, grad_key, place(grad_key, text, group, first + CHUNK), width)
            fetch(queue, grad_value, place(grad_value, text, group, first + CHUNK), value_width)
            add_product(grad_e, v, R_t, False, queue)
            add_outer(ones[0], r, grad_e)
            add_product(grad_m, k, R, False, queue)
            if use_elu:
                through_elu(grad_e, k)
            store(grad_e, ones, grad_keys, place(grad_key, text, group, first), width, count, width)
            store(grad_m, ones, grad_values, place(grad_value, text, group, first), value_width, count, value_width)
        store_state(R, grad_memory, text, group)
        grad_normaliser[text, group] = r[0, :width]
