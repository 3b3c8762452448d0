"""The compiled loops behind `numba.py`, which alone imports this file, and only to run them. Rows are r = b h.

Every loop works on rows start..stop, so that threads can share them, and gives the same result for any such split.
`no_type_check` keeps the tests' shape checks, which wrap Python functions, away from what numba compiles.
"""

import math
from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# Reassociation and contraction make loops vectorise; not "nnan" and "ninf", since masks are -inf and nan must show.
compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz", "afn"})

CHUNK = 64  # members worked on at once: their queries, keys and logits stay in the first-level cache
LANES = 16  # a chunk is padded to a multiple of this, one vector of float32


@compiled
@no_type_check
def add_product(out, a, b, n_rows, n_inner, n_columns):
    """out += a @ b, 4 x 4 values of `a` held in registers."""
    whole_rows, whole_inner = n_rows - n_rows % 4, n_inner - n_inner % 4
    for i in range(0, whole_rows, 4):
        for k in range(0, whole_inner, 4):
            a00, a01, a02, a03 = a[i, k], a[i, k + 1], a[i, k + 2], a[i, k + 3]
            a10, a11, a12, a13 = a[i + 1, k], a[i + 1, k + 1], a[i + 1, k + 2], a[i + 1, k + 3]
            a20, a21, a22, a23 = a[i + 2, k], a[i + 2, k + 1], a[i + 2, k + 2], a[i + 2, k + 3]
            a30, a31, a32, a33 = a[i + 3, k], a[i + 3, k + 1], a[i + 3, k + 2], a[i + 3, k + 3]
            for j in range(n_columns):
                b0, b1, b2, b3 = b[k, j], b[k + 1, j], b[k + 2, j], b[k + 3, j]
                out[i, j] += a00 * b0 + a01 * b1 + a02 * b2 + a03 * b3
                out[i + 1, j] += a10 * b0 + a11 * b1 + a12 * b2 + a13 * b3
                out[i + 2, j] += a20 * b0 + a21 * b1 + a22 * b2 + a23 * b3
                out[i + 3, j] += a30 * b0 + a31 * b1 + a32 * b2 + a33 * b3
        for k in range(whole_inner, n_inner):
            a0, a1, a2, a3 = a[i, k], a[i + 1, k], a[i + 2, k], a[i + 3, k]
            for j in range(n_columns):
                out[i, j] += a0 * b[k, j]
                out[i + 1, j] += a1 * b[k, j]
                out[i + 2, j] += a2 * b[k, j]
                out[i + 3, j] += a3 * b[k, j]
    for i in range(whole_rows, n_rows):
        for k in range(n_inner):
            x = a[i, k]
            for j in range(n_columns):
                out[i, j] += x * b[k, j]


@intrinsic
@no_type_check
def float_from_bits(typing_context, bits):
    """The float32 with these bits."""

    @no_type_check
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@intrinsic
@no_type_check
def prefetch(typing_context, x, row, i, column):
    """Bring x[row, i, column] into the cache: a cluster's members lie anywhere, and waiting for them takes longest."""

    @no_type_check
    def generate(context, builder, signature, arguments):
        array = context.make_array(x)(context, builder, arguments[0])
        position = [
            context.cast(builder, a, t, types.intp) for a, t in zip(arguments[1:], signature.args[1:], strict=True)
        ]
        element = cgutils.get_item_pointer(context, builder, x, array, position)
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        read, closest, data = (ir.Constant(number, flag) for flag in (0, 3, 1))
        builder.call(function, [builder.bitcast(element, byte), read, closest, data])
        return context.get_dummy_value()

    return types.void(x, row, i, column), generate


@compiled
@no_type_check
def prefetch_rows(x, row, index):
    """Bring the rows x[row, index] into the cache."""
    line = 64 // x.itemsize
    for i in index:
        for column in range(0, x.shape[2], line):
            prefetch(x, row, i, column)


@no_type_check
def exponential(x):
    """e^x for x <= 0; the compiler turns the float32 form into vector code, which it cannot do with a library call."""
    return math.exp(x)


@overload(exponential, inline="always")
@no_type_check
def _exponential(x):
    if x != types.float32:
        return lambda x: math.exp(x)

    @no_type_check
    def float32_form(x):
        # e^x = 2^n e^r, |r| <= ln(2) / 2, and a polynomial for e^r (Cephes, expf), right to two units in the last place
        n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
        n = max(n, np.float32(-127.0))
        r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1.0)
        result = p * float_from_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))
        return np.float32(0.0) if x < np.float32(-87.0) else result

    return float32_form


@compiled
@no_type_check
def fit(start, stop, sample, by_width, weight, picks, iterations, centroid):
    """k-means: see `kernels.torch.fit`, which this repeats step by step. `by_width` is the sample transposed."""
    _, length, width = sample.shape
    clusters, candidates = picks.shape
    number_type = sample.dtype.type  # a plain 0 or 2 among float32 numbers would make all of them float64
    zero, two = number_type(0), number_type(2)
    squares = np.empty(length, sample.dtype)
    distance = np.empty(length, sample.dtype)
    cumulated = np.empty(length, np.float64)
    at = np.empty((candidates, width), sample.dtype)
    apart = np.empty((candidates, length), sample.dtype)
    score = np.empty((clusters, length), sample.dtype)
    member = np.empty(length, np.int64)
    total = np.empty((clusters, width), sample.dtype)
    number = np.empty(clusters, np.int64)
    for r in range(start, stop):
        for i in range(length):
            squares[i] = 0
            for e in range(width):
                squares[i] += sample[r, i, e] * sample[r, i, e]
            distance[i] = weight[r, i]
        for c in range(clusters):
            running = 0.0
            for i in range(length):
                running += distance[i]
                cumulated[i] = running
            for d in range(candidates):
                for i in range(length):
                    apart[d, i] = zero
                drawn = min(np.searchsorted(cumulated, picks[c, d] * running, side="right"), length - 1)
                for e in range(width):
                    at[d, e] = sample[r, drawn, e]
            add_product(apart, at, by_width[r], candidates, width, length)
            best, best_left = 0, np.inf
            for d in range(candidates):
                square = zero
                for e in range(width):
                    square += at[d, e] * at[d, e]
                left = zero
                for i in range(length):
                    x = squares[i] + square - two * apart[d, i]
                    x = (x if x > zero else zero) * weight[r, i]
                    x = distance[i] if c > 0 and distance[i] < x else x
                    apart[d, i] = x
                    left += x
                handicapped = left * (1 + 1e-5 * d)
                if handicapped < best_left:
                    best, best_left = d, handicapped
            for i in range(length):
                distance[i] = apart[best, i]
            for e in range(width):
                centroid[r, c, e] = at[best, e]
        for _ in range(iterations):
            for c in range(clusters):
                square = zero
                for e in range(width):
                    square += centroid[r, c, e] * centroid[r, c, e]
                for i in range(length):
                    score[c, i] = -square / two
            add_product(score, centroid[r], by_width[r], clusters, width, length)
            best_of_columns(score, clusters, length, member)
            total[:] = 0
            number[:] = 0
            for i in range(length):
                if weight[r, i] > 0:
                    number[member[i]] += 1
                    for e in range(width):
                        total[member[i], e] += sample[r, i, e]
            for c in range(clusters):
                if number[c] > 0:
                    for e in range(width):
                        centroid[r, c, e] = total[c, e] / number[c]


@compiled
@no_type_check
def best_of_columns(score, n_rows, n_columns, best):
    """best[j] = the first i with the largest score[i, j]."""
    largest = np.empty(256, score.dtype)
    first = np.empty(256, np.int32)
    for begin in range(0, n_columns, 256):
        n = min(256, n_columns - begin)
        for j in range(n):
            largest[j] = score[0, begin + j]
            first[j] = 0
        for i in range(1, n_rows):
            for j in range(n):
                x = score[i, begin + j]
                better = x > largest[j]
                largest[j] = x if better else largest[j]
                first[j] = i if better else first[j]
        for j in range(n):
            best[begin + j] = first[j]


@compiled
@no_type_check
def nearest(start, stop, score, assignment):
    """The first best row of every column of score (rows, clusters, queries)."""
    for r in range(start, stop):
        best_of_columns(score[r], score.shape[1], score.shape[2], assignment[r])


@compiled
@no_type_check
def centroids(start, stop, query, assignment, centroid, number):
    """The mean query of every cluster, 0 for an empty one, and how many queries it has."""
    _, length, width = query.shape
    clusters = centroid.shape[1]
    for r in range(start, stop):
        centroid[r] = 0
        number[r] = 0
        for i in range(length):
            c = assignment[r, i]
            if c >= 0:
                number[r, c] += 1
                for e in range(width):
                    centroid[r, c, e] += query[r, i, e]
        for c in range(clusters):
            share = query.dtype.type(1) / max(number[r, c], 1)
            for e in range(width):
                centroid[r, c, e] *= share


@compiled
@no_type_check
def select_largest(values, index, n, k):
    """Reorder values[:n] and, with them, index so that the k largest come first (Hoare's quickselect)."""
    low, high = 0, n - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                index[i], index[j] = index[j], index[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            return


@compiled
@no_type_check
def softmax_and_top(start, stop, logits, seen, top, top_attention, normaliser):
    """logits (rows, clusters, keys) become attention, in place; and the keys with the largest, -1 for want of one.

    The keys are folded into columns. The k-th largest maximum of a column is a lower bound for the k-th largest logit,
    so only k columns or so are searched further. That takes columns + k length / columns steps, least near
    sqrt(k length); half as many is fastest here.
    """
    _, clusters, length = logits.shape
    k = top.shape[2]
    masked = seen.shape[0] > 0
    columns = min(length, max(LANES, int(math.sqrt(length * k) / 2)))
    maxima = np.empty(columns, logits.dtype)
    ranked = np.empty(columns, logits.dtype)
    column = np.empty(columns, np.int32)
    found = np.empty(length, logits.dtype)
    found_at = np.empty(length, np.int32)
    lowest = logits.dtype.type(-np.inf)
    for r in range(start, stop):
        for c in range(clusters):
            row = logits[r, c]
            if masked:
                keep = seen[r]
                for s in range(length):
                    row[s] = row[s] if keep[s] else lowest
            maxima[:] = lowest
            for begin in range(0, length, columns):
                for s in range(min(columns, length - begin)):
                    x = row[begin + s]
                    maxima[s] = x if x > maxima[s] else maxima[s]
            largest = lowest
            for s in range(columns):
                largest = max(largest, maxima[s])

            bound = lowest
            if 0 < k <= columns:
                ranked[:] = maxima
                select_largest(ranked, column, columns, k)
                bound = ranked[0]
                for s in range(1, k):
                    bound = min(bound, ranked[s])
            n = 0
            if k > 0:
                for s in range(columns):
                    if maxima[s] >= bound:
                        for t in range(s, length, columns):
                            if row[t] >= bound and row[t] > lowest:
                                found[n] = row[t]
                                found_at[n] = t
                                n += 1
                if n > k:
                    select_largest(found, found_at, n, k)

            total = logits.dtype.type(0)
            for s in range(length):
                x = exponential(row[s] - largest)
                row[s] = x
                total += x
            share = logits.dtype.type(1) / total
            for s in range(length):
                row[s] *= share
            normaliser[r, c] = largest + math.log(total)
            for j in range(k):
                top[r, c, j] = found_at[j] if j < n else -1
                top_attention[r, c, j] = row[found_at[j]] if j < n else 0
            for j in range(min(n, k)):
                row[found_at[j]] = 0


@compiled
@no_type_check
def sort_by_cluster(assignment, clusters, order, begin):
    """The queries in the order of their clusters: cluster c's are order[begin[c] : begin[c + 1]]. -1 is left out."""
    begin[:] = 0
    for i in range(len(assignment)):
        if assignment[i] >= 0:
            begin[assignment[i] + 1] += 1
    for c in range(clusters):
        begin[c + 1] += begin[c]
    for i in range(len(assignment)):
        c = assignment[i]
        if c >= 0:
            order[begin[c]] = i
            begin[c] += 1
    for c in range(clusters, 0, -1):
        begin[c] = begin[c - 1]
    begin[0] = 0


@compiled
@no_type_check
def gather(x, index, out):
    """out[j] = x[index[j]], and 0 for an index of -1."""
    for j in range(len(index)):
        if index[j] < 0:
            out[j] = 0
        else:
            for e in range(x.shape[1]):
                out[j, e] = x[index[j], e]


@compiled
@no_type_check
def gather_columns(x, index, n, n_columns, factor, out):
    """out[:, j] = factor * x[index[j]] for j < n, and 0 up to n_columns."""
    for j in range(n):
        for e in range(x.shape[1]):
            out[e, j] = x[index[j], e] * factor
    for j in range(n, n_columns):
        for e in range(x.shape[1]):
            out[e, j] = 0


@compiled
@no_type_check
def softmax_of_columns(logits, index, n_columns):
    """Softmax over the rows j of logits[j, :n_columns], in place; a row with index -1 gets 0."""
    largest = np.full(CHUNK, -np.inf, logits.dtype)
    total = np.zeros(CHUNK, logits.dtype)
    for j in range(len(index)):
        if index[j] >= 0:
            for i in range(n_columns):
                x = logits[j, i]
                largest[i] = x if x > largest[i] else largest[i]
    for j in range(len(index)):
        if index[j] < 0:
            logits[j, :n_columns] = 0
        else:
            for i in range(n_columns):
                x = exponential(logits[j, i] - largest[i])
                logits[j, i] = x
                total[i] += x
    for i in range(n_columns):
        total[i] = logits.dtype.type(1) / total[i]
    for j in range(len(index)):
        for i in range(n_columns):
            logits[j, i] *= total[i]


@compiled
@no_type_check
def transpose(x, n_columns, factor, out):
    """out[i, j] = factor * x[j, i] for i < n_columns."""
    for j in range(x.shape[0]):
        for i in range(n_columns):
            out[i, j] = x[j, i] * factor


@compiled
@no_type_check
def attend_members(start, stop, group, query, key, value, assignment, summary, top, top_attention, scale, out):
    """out_i = V^c without the top keys + m softmax(scale q_i . k_top) v_top, cluster by cluster."""
    _, length, width = query.shape
    scale = query.dtype.type(scale)
    value_width = value.shape[2]
    _, clusters, k = top.shape
    order = np.empty(length, np.int32)
    begin = np.empty(clusters + 1, np.int32)
    keys = np.empty((k, width), query.dtype)
    values = np.empty((k, value_width), query.dtype)
    queries = np.empty((width, CHUNK), query.dtype)  # a column a member, as the softmax wants it
    weights = np.empty((k, CHUNK), query.dtype)
    weights_of = np.empty((CHUNK, k), query.dtype)  # a row a member
    results = np.empty((CHUNK, value_width), query.dtype)
    for r in range(start, stop):
        sort_by_cluster(assignment[r], clusters, order, begin)
        for i in range(length):
            if assignment[r, i] < 0:
                out[r, i] = 0
        for c in range(clusters):
            if begin[c] == begin[c + 1]:
                continue
            gather(key[r // group], top[r, c], keys)
            gather(value[r // group], top[r, c], values)
            if c + 1 < clusters:
                prefetch_rows(key, r // group, top[r, c + 1])
                prefetch_rows(value, r // group, top[r, c + 1])
            mass = top_attention[r, c].sum()
            for first in range(begin[c], begin[c + 1], CHUNK):
                members = order[first : min(first + CHUNK, begin[c + 1])]
                n = len(members)
                n_columns = (n + LANES - 1) // LANES * LANES
                soon = order[first + CHUNK : min(first + 2 * CHUNK, begin[clusters])]
                prefetch_rows(query, r, soon)
                prefetch_rows(out, r, soon)
                gather_columns(query[r], members, n, n_columns, scale, queries)
                weights[:] = 0
                add_product(weights, keys, queries, k, width, n_columns)
                softmax_of_columns(weights, top[r, c], n_columns)
                transpose(weights, n_columns, mass, weights_of)
                for i in range(n):
                    for e in range(value_width):
                        results[i, e] = summary[r, c, e]
                add_product(results, weights_of, values, n, k, value_width)
                for i in range(n):
                    for e in range(value_width):
                        out[r, members[i], e] = results[i, e]


@compiled
@no_type_check
def attend_members_backward(
    start,
    stop,
    group,
    grad_out,
    query,
    key,
    value,
    assignment,
    top,
    top_attention,
    scale,
    grad_query,
    grad_key,
    grad_value,
    grad_summary,
    grad_mass,
):
    """Gradients of `attend_members`. start..stop are key rows; `group` rows of queries add to the gradient of each."""
    _, length, width = query.shape
    scale = query.dtype.type(scale)
    value_width = value.shape[2]
    _, clusters, k = top.shape
    order = np.empty(length, np.int32)
    begin = np.empty(clusters + 1, np.int32)
    keys = np.empty((k, width), query.dtype)
    values = np.empty((k, value_width), query.dtype)
    grad_keys = np.empty((k, width), query.dtype)
    grad_values = np.empty((k, value_width), query.dtype)
    queries = np.empty((width, CHUNK), query.dtype)
    queries_of = np.empty((CHUNK, width), query.dtype)
    grads = np.empty((value_width, CHUNK), query.dtype)
    grads_of = np.empty((CHUNK, value_width), query.dtype)
    weights = np.empty((k, CHUNK), query.dtype)
    grad_weights = np.empty((k, CHUNK), query.dtype)
    grad_weights_of = np.empty((CHUNK, k), query.dtype)
    along = np.empty(CHUNK, query.dtype)
    grad_queries = np.empty((CHUNK, width), query.dtype)
    for r in range(start * group, stop * group):
        sort_by_cluster(assignment[r], clusters, order, begin)
        for i in range(length):
            if assignment[r, i] < 0:
                grad_query[r, i] = 0
        for c in range(clusters):
            gather(key[r // group], top[r, c], keys)
            gather(value[r // group], top[r, c], values)
            if c + 1 < clusters:
                prefetch_rows(key, r // group, top[r, c + 1])
                prefetch_rows(value, r // group, top[r, c + 1])
            mass = top_attention[r, c].sum()
            grad_keys[:] = 0
            grad_values[:] = 0
            grad_summary[r, c] = 0
            grad_mass[r, c] = 0
            for first in range(begin[c], begin[c + 1], CHUNK):
                members = order[first : min(first + CHUNK, begin[c + 1])]
                n = len(members)
                n_columns = (n + LANES - 1) // LANES * LANES
                soon = order[first + CHUNK : min(first + 2 * CHUNK, begin[clusters])]
                prefetch_rows(query, r, soon)
                prefetch_rows(grad_out, r, soon)
                prefetch_rows(grad_query, r, soon)
                gather(query[r], members, queries_of)
                gather(grad_out[r], members, grads_of)
                gather_columns(query[r], members, n, n_columns, scale, queries)
                gather_columns(grad_out[r], members, n, n_columns, query.dtype.type(1), grads)
                for i in range(n):
                    for e in range(value_width):
                        grad_summary[r, c, e] += grads_of[i, e]

                weights[:] = 0
                add_product(weights, keys, queries, k, width, n_columns)
                softmax_of_columns(weights, top[r, c], n_columns)
                grad_weights[:] = 0
                add_product(grad_weights, values, grads, k, value_width, n_columns)
                along[:] = 0
                for j in range(k):
                    for i in range(n_columns):
                        along[i] += weights[j, i] * grad_weights[j, i]
                for i in range(n):
                    grad_mass[r, c] += along[i]
                for j in range(k):  # from here on, the gradient of the logits
                    for i in range(n_columns):
                        weights[j, i] *= mass
                        grad_weights[j, i] = weights[j, i] * (grad_weights[j, i] - along[i])

                add_product(grad_values, weights, grads_of, k, n, value_width)
                add_product(grad_keys, grad_weights, queries_of, k, n, width)
                transpose(grad_weights, n_columns, scale, grad_weights_of)
                grad_queries[:n] = 0
                add_product(grad_queries, grad_weights_of, keys, n, k, width)
                for i in range(n):
                    for e in range(width):
                        grad_query[r, members[i], e] = grad_queries[i, e]
            for j in range(k):
                t = top[r, c, j]
                if t >= 0:
                    for e in range(width):
                        grad_key[r // group, t, e] += scale * grad_keys[j, e]
                    for e in range(value_width):
                        grad_value[r // group, t, e] += grad_values[j, e]


@compiled
@no_type_check
def attend_centroids_backward(start, stop, logits, grad, seen, normaliser, top, top_attention, grad_mass):
    """In place: logits become attention without the top keys, grad (of that attention) the gradient of the logits."""
    _, clusters, length = logits.shape
    k = top.shape[2]
    masked = seen.shape[0] > 0
    zero = logits.dtype.type(0)
    for r in range(start, stop):
        for c in range(clusters):
            row, slope, at = logits[r, c], grad[r, c], top[r, c]
            for s in range(length):
                row[s] = exponential(row[s] - normaliser[r, c])
            if masked:
                keep = seen[r]
                for s in range(length):
                    row[s] = row[s] if keep[s] else zero
            along = zero
            for j in range(k):
                if at[j] >= 0:
                    row[at[j]] = 0
                    along += top_attention[r, c, j] * grad_mass[r, c]
            for s in range(length):
                along += row[s] * slope[s]
            for s in range(length):
                slope[s] = row[s] * (slope[s] - along)
            for j in range(k):
                if at[j] >= 0:
                    slope[at[j]] = top_attention[r, c, j] * (grad_mass[r, c] - along)


@compiled
@no_type_check
def add_shares(start, stop, grad_centroid, number, assignment, grad_query):
    """Every member gets its share of its centroid's gradient: the backward pass of `centroids`."""
    _, length, width = grad_query.shape
    for r in range(start, stop):
        for c in range(grad_centroid.shape[1]):
            share = grad_centroid.dtype.type(1) / max(number[r, c], 1)
            for e in range(width):
                grad_centroid[r, c, e] *= share
        for i in range(length):
            c = assignment[r, i]
            if c >= 0:
                for e in range(width):
                    grad_query[r, i, e] += grad_centroid[r, c, e]
