"""Vector operations that numba's own loops do not become, or not always: what makes `numba_loops.py` fast.

Written in LLVM's intermediate language, so they run on every processor; only the size of the tile is chosen for this
one. All work on contiguous float32 arrays at an offset, counted in numbers, and check no bounds.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FEATURES = llvm.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx2") else 4  # float32 numbers in a vector
TILE = 8 if LANES != 8 else 4  # rows of two vectors that the registers hold: AVX2 has 16 of them, the others 32

NUMBER, INDEX = ir.FloatType(), ir.IntType(64)
VECTOR, BITS = ir.VectorType(NUMBER, LANES), ir.VectorType(ir.IntType(32), LANES)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * LANES)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [offset])


def _load(builder: Any, pointer: Any) -> Any:
    vector = builder.load(builder.bitcast(pointer, VECTOR.as_pointer()))
    vector.align = 4
    return vector


def _store(builder: Any, vector: Any, pointer: Any) -> None:
    builder.store(vector, builder.bitcast(pointer, VECTOR.as_pointer())).align = 4


def _spread(builder: Any, number: Any) -> Any:
    """A vector of one number."""
    first = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, ir.Constant(BITS, [0] * LANES))


def _multiply_add(builder: Any) -> Callable[[Any, Any, Any], Any]:
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    return lambda a, b, c: builder.call(function, [a, b, c])


def _tile(rows: int, vectors: int) -> Callable[..., None]:
    """out (rows, vectors * LANES) = a @ b, plus out if `add`, the sums held in registers.

    a[r, i] is at a_at + r a_row + i a_inner, so that `a` may be transposed; rows of b and out are b_row, out_row apart.
    `inner`, the length of the sums, is at least 1.
    """

    @intrinsic
    @no_type_check
    def product(typing_context, a, a_at, a_row, a_inner, b, b_at, b_row, inner, out, out_at, out_row, add):
        @no_type_check
        def generate(context, builder, signature, arguments):
            a, a_at, a_row, a_inner, b, b_at, b_row, inner, out, out_at, out_row, add = arguments
            a = _pointer(context, builder, signature.args[0], a, a_at)
            b = _pointer(context, builder, signature.args[4], b, b_at)
            out = _pointer(context, builder, signature.args[8], out, out_at)
            fma = _multiply_add(builder)

            def at(base, *steps):
                for step, number in steps:
                    base = builder.gep(
                        base, [builder.mul(step, number if isinstance(number, ir.Value) else INDEX(number))]
                    )
                return base

            cells = [at(out, (out_row, r), (INDEX(LANES), v)) for r in range(rows) for v in range(vectors)]
            before = [builder.select(add, _load(builder, cell), _constant(0.0)) for cell in cells]
            entry = builder.block
            loop, end = builder.append_basic_block("loop"), builder.append_basic_block("end")
            builder.branch(loop)

            builder.position_at_end(loop)
            i = builder.phi(INDEX)
            sums = [builder.phi(VECTOR) for _ in cells]
            columns = [_load(builder, at(b, (b_row, i), (INDEX(LANES), v))) for v in range(vectors)]
            after = []
            for r in range(rows):
                number = builder.load(at(a, (a_row, r), (a_inner, i)))
                spread = _spread(builder, number)
                after += [fma(spread, columns[v], sums[r * vectors + v]) for v in range(vectors)]
            following = builder.add(i, INDEX(1))
            i.add_incoming(INDEX(0), entry)
            i.add_incoming(following, builder.block)
            for phi, old, new in zip(sums, before, after, strict=True):
                phi.add_incoming(old, entry)
                phi.add_incoming(new, builder.block)
            builder.cbranch(builder.icmp_signed("<", following, inner), loop, end)

            builder.position_at_end(end)
            for cell, total in zip(cells, after, strict=True):
                _store(builder, total, cell)
            return context.get_dummy_value()

        n = types.int64
        return types.none(a, n, n, n, b, n, n, n, out, n, n, types.boolean), generate

    return product


one_vector, two_vectors, one_row = _tile(2 * TILE, 1), _tile(TILE, 2), _tile(1, 1)


# 2^f for |f| <= 1/2, relative error 9e-8
POLYNOMIAL = (1.0, 0.693147, 0.24022242, 0.055507336, 0.009671513, 0.0013264727)


@intrinsic
@no_type_check
def elu_vector(typing_context, x, at, out, out_at):
    """out = elu(x) + 1 = max(x, 0) + exp(min(x, 0)) for LANES numbers, to two units in the last place.

    exp(x) = 2^n 2^f with n the integer next to x / ln 2: a polynomial for 2^f, |f| <= 1/2, and n by adding a number so
    large that the sum's last bits are n. No flag may let the compiler cancel that sum. Below -88 the result is 0.
    """

    @no_type_check
    def generate(context, builder, signature, arguments):
        x, at, out, out_at = arguments
        x = _load(builder, _pointer(context, builder, signature.args[0], x, at))
        fma, zero, lowest = _multiply_add(builder), _constant(0.0), _constant(-88.02969)  # where n's bits are 0
        is_positive = builder.fcmp_ordered(">", x, zero)
        positive, negative = builder.select(is_positive, x, zero), builder.select(is_positive, zero, x)  # keeps nan
        negative = builder.select(builder.fcmp_ordered("<", negative, lowest), lowest, negative)
        scale, large = _constant(1.4426950408889634), _constant(1.5 * 2**23 + 127)
        shifted = fma(negative, scale, large)
        f = fma(negative, scale, builder.fneg(builder.fsub(shifted, large)))
        p = _constant(POLYNOMIAL[-1])
        for coefficient in POLYNOMIAL[-2::-1]:
            p = fma(p, f, _constant(coefficient))
        bits = builder.shl(builder.bitcast(shifted, BITS), ir.Constant(BITS, [23] * LANES))
        result = fma(p, builder.bitcast(bits, VECTOR), positive)
        _store(builder, result, _pointer(context, builder, signature.args[2], out, out_at))
        return context.get_dummy_value()

    return types.none(x, types.int64, out, types.int64), generate


def _with_number(compute: Callable[..., Any]) -> Callable[..., None]:
    """out = compute(number, x, out) for LANES numbers of x and out."""

    @intrinsic
    @no_type_check
    def operation(typing_context, number, x, at, out, out_at):
        @no_type_check
        def generate(context, builder, signature, arguments):
            number, x, at, out, out_at = arguments
            x = _load(builder, _pointer(context, builder, signature.args[1], x, at))
            out = _pointer(context, builder, signature.args[3], out, out_at)
            _store(builder, compute(builder, _spread(builder, number), x, _load(builder, out)), out)
            return context.get_dummy_value()

        return types.none(types.float32, x, types.int64, out, types.int64), generate

    return operation


def _with_vector(compute: Callable[..., Any]) -> Callable[..., None]:
    """out = compute(x, y, out) for LANES numbers of each."""

    @intrinsic
    @no_type_check
    def operation(typing_context, x, at, y, y_at, out, out_at):
        @no_type_check
        def generate(context, builder, signature, arguments):
            x, at, y, y_at, out, out_at = arguments
            x = _load(builder, _pointer(context, builder, signature.args[0], x, at))
            y = _load(builder, _pointer(context, builder, signature.args[2], y, y_at))
            out = _pointer(context, builder, signature.args[4], out, out_at)
            _store(builder, compute(builder, x, y, _load(builder, out)), out)
            return context.get_dummy_value()

        n = types.int64
        return types.none(x, n, y, n, out, n), generate

    return operation


def _times_derivative_of_elu(builder: Any, x: Any, y: Any, _: Any) -> Any:
    one = _constant(1.0)
    return builder.fmul(x, builder.select(builder.fcmp_ordered("<", y, one), y, one))


scale_vector = _with_number(lambda builder, number, x, out: builder.fmul(number, x))
add_scaled_vector = _with_number(lambda builder, number, x, out: _multiply_add(builder)(number, x, out))
multiply_vector = _with_vector(lambda builder, x, y, out: builder.fmul(x, y))
through_elu_vector = _with_vector(_times_derivative_of_elu)  # x min(y, 1), of features y


def _halves() -> tuple[ir.Constant, ir.Constant]:
    """The shuffles that interleave the lower and the upper halves of two vectors."""
    pairs = [i // 2 + i % 2 * LANES for i in range(LANES)]
    return ir.Constant(BITS, pairs), ir.Constant(BITS, [LANES // 2 + i for i in pairs])


@intrinsic
@no_type_check
def dot_vectors(typing_context, x, at, row, y, y_at, y_row, length, out, out_at):
    """out[r] = x[r] . y[r] over `length` numbers, for LANES rows: a sum of vectors for each, then of pairs of them."""

    @no_type_check
    def generate(context, builder, signature, arguments):
        x, at, row, y, y_at, y_row, length, out, out_at = arguments
        x = _pointer(context, builder, signature.args[0], x, at)
        y = _pointer(context, builder, signature.args[3], y, y_at)
        fma, entry = _multiply_add(builder), builder.block
        loop, end = builder.append_basic_block("loop"), builder.append_basic_block("end")
        builder.branch(loop)

        builder.position_at_end(loop)
        i = builder.phi(INDEX)
        totals = [builder.phi(VECTOR) for _ in range(LANES)]
        more = []
        for r, total in enumerate(totals):
            pair = (
                _load(builder, builder.gep(base, [builder.add(i, builder.mul(step, INDEX(r)))]))
                for base, step in ((x, row), (y, y_row))
            )
            more.append(fma(*pair, total))
        following = builder.add(i, INDEX(LANES))
        for phi, first, then in ((i, INDEX(0), following), *zip(totals, [_constant(0.0)] * LANES, more, strict=True)):
            phi.add_incoming(first, entry)
            phi.add_incoming(then, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, length), loop, end)

        builder.position_at_end(end)
        low, high = _halves()
        while len(more) > 1:
            pairs = zip(more[: len(more) // 2], more[len(more) // 2 :], strict=True)
            more = [builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in (low, high))) for a, b in pairs]
        _store(builder, more[0], _pointer(context, builder, signature.args[7], out, out_at))
        return context.get_dummy_value()

    n = types.int64
    return types.none(x, n, n, y, n, n, n, out, n), generate


@intrinsic
@no_type_check
def transpose_block(typing_context, x, at, row, out, out_at, out_row):
    """out = x^T for LANES x LANES numbers: log2(LANES) perfect shuffles of the rows."""

    @no_type_check
    def generate(context, builder, signature, arguments):
        x, at, row, out, out_at, out_row = arguments
        x = _pointer(context, builder, signature.args[0], x, at)
        out = _pointer(context, builder, signature.args[3], out, out_at)
        rows = [_load(builder, builder.gep(x, [builder.mul(row, INDEX(i))])) for i in range(LANES)]
        half, masks = LANES // 2, _halves()
        for _ in range(LANES.bit_length() - 1):
            pairs = [(rows[i], rows[i + half]) for i in range(half)]
            rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
        for i, vector in enumerate(rows):
            _store(builder, vector, builder.gep(out, [builder.mul(out_row, INDEX(i))]))
        return context.get_dummy_value()

    n = types.int64
    return types.none(x, n, n, out, n, n), generate


@intrinsic
@no_type_check
def address(typing_context, x, at):
    """Where in memory x[at] is; it need not exist."""

    @no_type_check
    def generate(context, builder, signature, arguments):
        return builder.ptrtoint(_pointer(context, builder, signature.args[0], *arguments), INDEX)

    return types.int64(x, types.int64), generate


@intrinsic
@no_type_check
def prefetch(typing_context, place, distance):
    """Bring four times four cache lines nearer, `distance` bytes apart from this address on; they need not exist."""

    @no_type_check
    def generate(context, builder, signature, arguments):
        place, distance = arguments
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        read, second_level, data = number(0), number(2), number(1)
        for _ in range(4):
            for line in range(4):
                where = builder.inttoptr(builder.add(place, INDEX(64 * line)), byte)
                builder.call(function, [where, read, second_level, data])
            place = builder.add(place, distance)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate
