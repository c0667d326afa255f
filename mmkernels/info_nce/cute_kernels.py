"""The forward pass of info_nce for Hopper in NVIDIA's CuTe DSL: TMA, a producer warp, two warpgroups of WGMMA.

Backward is Triton's. Nobody has run this kernel on a GPU: its machine code is compiled and read, and its PTX is
interpreted on a CPU in the tests (docs/info_nce_cute.md). So "auto" never takes it.

A block holds 128 queries in shared memory, all features of them, and walks over tiles of 128 keys, which stream through
a ring of slices of 64 features; the two blocks of a cluster, with queries of their own, read each slice together
(multicast). A warpgroup owns 64 of the queries. It makes the product of the next tile into one accumulator while it
turns the other, of this tile, into statistics, a piece of them after each slice: the tensor cores never wait for it.

    plain tile     2^(s - ref), ref the largest logit of the warp's 16 x 128: one exponential for row and column
    other tiles    true maxima of rows and columns, two exponentials: tiles with a positive, or at an edge, or where the
                   sum of a row or column of the warp is below 2^-64

Rows keep (m, z) in registers; the columns' of a warpgroup go to memory, (m, z) of 64 rows or of all that the block has
seen. No atomics: every partial result has one owner, and the finish kernel, Triton's, merges them in order.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils.hopper_helpers as sm90
import torch
from cutlass import Float32, Int32, Int64, cute, pipeline
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_ptr
from cutlass.cutlass_dsl import T, dsl_user_op
from torch import Tensor

from mmkernels._checks import require_targets
from mmkernels._tiles.launch import aligned
from mmkernels._tiles.triton import cdiv, chip_of, on_device
from mmkernels.info_nce.triton_kernels import CrossEntropy, finish_forward

ROWS, COLS, SLICE = 128, 128, 64  # queries and keys of a tile, features of a slice
CLUSTER = 2
MOST_FEATURES = 512
_SHARED = 227 << 10  # bytes of a block
_PIECES = 8  # of the statistics of a tile
_LOG2E = 1.4426950408889634
_LOWEST = -3.0e38
_FINITE = -1.0e30  # stands for the maximum of nothing, so that no exponent is inf - inf
_LEAST = 2.0**-64


@cute.jit
def _other(x, bit: cutlass.Constexpr):
    return cute.arch.shuffle_sync_bfly(x, offset=bit)


@cute.jit
def _exp2(x):
    return cute.math.exp2(x, fastmath=True)


@dsl_user_op
def _exp2_here(x, *, loc=None, ip=None):
    """2^x that stays between the waits that it stands between: the compiler would move it to where it is used."""
    code = ("ex2.approx.ftz.f32 $0, $1;", "=f,f")
    bits = llvm.inline_asm(
        T.f32(), [Float32(x).ir_value(loc=loc, ip=ip)], *code, has_side_effects=True,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return Float32(bits)


class Share(NamedTuple):
    """How tiles are dealt to clusters: row by row of pairs of blocks, each cluster takes neighbours."""

    clusters: int
    each: int  # tiles of a cluster
    rest: int  # so many clusters, the first, have one more

    @classmethod
    def of(cls, num_queries: int, num_keys: int, multiprocessors: int) -> "Share":
        tiles = cdiv(num_queries, CLUSTER * ROWS) * cdiv(num_keys, COLS)
        clusters = min(max(multiprocessors // CLUSTER, 1), tiles)
        return cls(clusters, tiles // clusters, tiles % clusters)


class Forward:
    """The kernel for features of one number of slices. Compiled by cute.compile."""

    def __init__(self, slices: int) -> None:
        self.slices = slices
        statistics = 4 * 2 * 2 * 4 * COLS
        self.stages = min((_SHARED - 1024 - statistics - ROWS * SLICE * 2 * slices) // (COLS * SLICE * 2), 8)

    @cute.jit
    def __call__(
        self, queries_at: cute.Pointer, keys_at: cute.Pointer, targets_at: cute.Pointer, scale_at: cute.Pointer,
        row_partials_at: cute.Pointer, col_partials_at: cute.Pointer, positives_at: cute.Pointer,
        N: Int32, M: Int32, D: Int32, stride_q: Int64, stride_k: Int64, slots: Int32, planes: Int32,
        clusters: Int32, each: Int32, rest: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        stride_q, stride_k = cute.assume(stride_q, divby=8), cute.assume(stride_k, divby=8)
        queries = cute.make_tensor(queries_at, cute.make_layout((N, D), stride=(stride_q, 1)))
        keys = cute.make_tensor(keys_at, cute.make_layout((M, D), stride=(stride_k, 1)))
        targets = cute.make_tensor(targets_at, cute.make_layout(N))
        scale = cute.make_tensor(scale_at, cute.make_layout(1))
        positives = cute.make_tensor(positives_at, cute.make_layout(N))
        row_partials = cute.make_tensor(
            row_partials_at, cute.make_layout((2, slots, N), stride=(Int64(slots) * N, Int64(N), 1))
        )
        col_partials = cute.make_tensor(
            col_partials_at, cute.make_layout((2, planes, M), stride=(Int64(planes) * M, Int64(M), 1))
        )
        dtype = queries.element_type
        layout = cutlass.tensor_utils.LayoutEnum.from_tensor(queries)
        major = layout.sm90_mma_major_mode()
        mma = sm90.make_trivial_tiled_mma(dtype, dtype, major, major, Float32, (2, 1, 1), tiler_mn=(64, COLS))
        atom = warpgroup.make_smem_layout_atom(sm90.get_smem_layout_atom(layout, dtype, SLICE), dtype)
        q_layout = cute.tile_to_shape(atom, (ROWS, SLICE, self.slices), order=(0, 1, 2))
        k_layout = cute.tile_to_shape(atom, (COLS, SLICE, self.stages), order=(0, 1, 2))
        q_atom, q_map = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), queries, cute.slice_(q_layout, (None, None, 0)), (ROWS, SLICE)
        )
        k_atom, k_map = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SMulticastOp(), keys, cute.slice_(k_layout, (None, None, 0)), (COLS, SLICE),
            num_multicast=CLUSTER,
        )  # fmt: skip

        @cute.struct
        class Storage:
            k_barriers: cute.struct.MemRange[Int64, self.stages * 2]
            q_barriers: cute.struct.MemRange[Int64, 2]
            queries: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(q_layout)], 1024]
            keys: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(k_layout)], 1024]
            statistics: cute.struct.Align[cute.struct.MemRange[Float32, 2 * 2 * 4 * COLS], 128]

        self.storage = Storage
        self.kernel(
            q_atom, q_map, k_atom, k_map, mma, q_layout, k_layout, targets, scale, row_partials, col_partials,
            positives, clusters, each, rest, N, M,
        ).launch(
            grid=[clusters * CLUSTER, 1, 1], block=[384, 1, 1], cluster=(CLUSTER, 1, 1), min_blocks_per_mp=1,
            stream=stream,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, q_atom: cute.CopyAtom, q_map: cute.Tensor, k_atom: cute.CopyAtom, k_map: cute.Tensor, mma: cute.TiledMma,
        q_layout: cute.ComposedLayout, k_layout: cute.ComposedLayout, targets: cute.Tensor, scale: cute.Tensor,
        row_partials: cute.Tensor, col_partials: cute.Tensor, positives: cute.Tensor, clusters: Int32, each: Int32,
        rest: Int32, N: Int32, M: Int32,
    ):  # fmt: skip
        SLICES = cutlass.const_expr(self.slices)
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        role = cute.arch.make_warp_uniform(thread // 128)
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        cluster = block // CLUSTER
        if warp == 0:
            cpasync.prefetch_descriptor(q_atom)
            cpasync.prefetch_descriptor(k_atom)
        storage = cutlass.memory.SmemAllocator().allocate(self.storage)
        one = pipeline.CooperativeGroup(pipeline.Agent.Thread)
        ring = pipeline.PipelineTmaAsync.create(
            barrier_storage=storage.k_barriers.data_ptr(),
            num_stages=self.stages,
            producer_group=one,
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, CLUSTER * 8),
            tx_count=COLS * SLICE * 2,
            cta_layout_vmnk=cute.make_layout((1, CLUSTER, 1, 1)),
            defer_sync=True,
        )
        held = pipeline.PipelineTmaAsync.create(
            barrier_storage=storage.q_barriers.data_ptr(),
            num_stages=1,
            producer_group=one,
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 8),
            tx_count=ROWS * SLICE * 2 * SLICES,
            cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
            defer_sync=True,
        )
        pipeline.pipeline_init_arrive(cluster_shape_mn=(CLUSTER, 1), is_relaxed=True)
        shared_queries = storage.queries.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        shared_keys = storage.keys.get_tensor(k_layout.outer, swizzle=k_layout.inner)
        # [column, warp, m or z, warpgroup]
        statistics = storage.statistics.get_tensor(cute.make_layout((COLS, 4, 2, 2)))
        to_queries, from_queries = cpasync.tma_partition(
            q_atom, 0, cute.make_layout(1), cute.group_modes(shared_queries, 0, 2),
            cute.group_modes(cute.local_tile(q_map, (ROWS, SLICE), (None, None)), 0, 2),
        )  # fmt: skip
        to_keys, from_keys = cpasync.tma_partition(
            k_atom, rank, cute.make_layout(CLUSTER), cute.group_modes(shared_keys, 0, 2),
            cute.group_modes(cute.local_tile(k_map, (COLS, SLICE), (None, None)), 0, 2),
        )  # fmt: skip
        col_tiles = cute.ceil_div(M, COLS)
        pairs = cute.ceil_div(cute.ceil_div(N, ROWS), CLUSTER)
        first = cluster * each + cutlass.min(cluster, rest)
        end = first + each
        if cluster < rest:
            end += 1
        # The loop makes two tiles at a time, and the product of one more: those past the end count for nothing.
        stop = first + (end - first + 1) // 2 * 2
        pair = first // col_tiles
        col = first - pair * col_tiles
        pipeline.pipeline_init_wait(cluster_shape_mn=(CLUSTER, 1))

        if role == 0:
            cute.arch.setmaxregister_decrease(40)
            if warp == 0:
                to_fill = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
                to_hold = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
                fresh = Int32(1)
                for _tile in range(first, stop + 1):
                    if fresh == 1:
                        held.producer_acquire(to_hold)
                        for part in cutlass.range_constexpr(SLICES):
                            cute.copy(
                                q_atom, from_queries[(None, pair * CLUSTER + rank, part)], to_queries[(None, part)],
                                tma_bar_ptr=held.producer_get_barrier(to_hold),
                            )  # fmt: skip
                        held.producer_commit(to_hold)
                        to_hold.advance()
                    for part in range(SLICES):
                        ring.producer_acquire(to_fill)
                        cute.copy(
                            k_atom, from_keys[(None, col, part)], to_keys[(None, to_fill.index)],
                            tma_bar_ptr=ring.producer_get_barrier(to_fill), mcast_mask=Int32((1 << CLUSTER) - 1),
                        )  # fmt: skip
                        ring.producer_commit(to_fill)
                        to_fill.advance()
                    col += 1
                    fresh = Int32(0)
                    if col == col_tiles:
                        col = Int32(0)
                        pair += 1
                        fresh = Int32(1)
                ring.producer_tail(to_fill)
        else:
            cute.arch.setmaxregister_increase(232)
            group = role - 1
            lane = cute.arch.lane_idx()
            w = warp % 4
            mine = mma.get_slice(cute.make_layout(2, stride=128)(group))
            of_queries = mma.make_fragment_A(mine.partition_A(shared_queries))
            of_keys = mma.make_fragment_B(mine.partition_B(shared_keys))
            acc0 = cute.make_rmem_tensor(mine.partition_shape_C((ROWS, COLS)), Float32)
            acc1 = cute.make_rmem_tensor(mine.partition_shape_C((ROWS, COLS)), Float32)
            read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
            free = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
            holding = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
            barrier = pipeline.NamedBarrier(barrier_id=1 + group, num_threads=128)
            scale2 = scale[0] * _LOG2E
            # Where few pairs of blocks are shared by several clusters, each tile's columns have a plane of their own;
            # else each block has one, to which it adds.
            by_block = pairs > clusters
            # Entries 4 j + v of a thread: row or (v >= 2) row + 8, column 8 j + 2 (lane % 4) + v % 2.
            row = (pair * CLUSTER + rank) * ROWS + group * 64 + w * 16 + lane // 4
            m0, m1 = Float32(_LOWEST), Float32(_LOWEST)
            z0, z1 = Float32(0.0), Float32(0.0)
            t0, t1 = Int32(-1), Int32(-1)
            if row < N:
                t0 = Int32(targets[row])
            if row + 8 < N:
                t1 = Int32(targets[row + 8])

            held.consumer_wait(holding)
            for part in cutlass.range_constexpr(SLICES):
                ring.consumer_wait(read)
                warpgroup.fence()
                for k in cutlass.range_constexpr(SLICE // 16):
                    mma.set(warpgroup.Field.ACCUMULATE, part > 0 or k > 0)
                    cute.gemm(mma, acc0, of_queries[(None, None, k, part)], of_keys[(None, None, k, read.index)], acc0)
                warpgroup.commit_group()
                read.advance()
                warpgroup.wait_group(0)
                ring.consumer_release(free)
                free.advance()
            for tile in range(first, stop, 2):
                for half in cutlass.range_constexpr(2):
                    acc, following = (acc0, acc1) if cutlass.const_expr(half == 0) else (acc1, acc0)
                    last = col + 1 == col_tiles  # of its rows
                    past = tile + half >= end
                    ends = last | (tile + half + 1 == end)
                    base = M if past else col * COLS
                    if last:
                        held.consumer_release(holding)
                        holding.advance()
                        held.consumer_wait(holding)
                    part_sums0 = [Float32(0.0), Float32(0.0)]
                    part_sums1 = [Float32(0.0), Float32(0.0)]
                    sums = []
                    ref, s0, s1 = Float32(0.0), Float32(0.0), Float32(0.0)
                    special = cutlass.Boolean(False)
                    lost = cutlass.Boolean(False)
                    old_m, old_z = Float32(_LOWEST), Float32(0.0)
                    column = base + thread % 128
                    plane = ((cluster if by_block else pair) * CLUSTER + rank) * 2 + group
                    joins = by_block & (tile + half - first >= col_tiles) & (column < M)
                    for piece in cutlass.range_constexpr(_PIECES):
                        part = piece * SLICES // _PIECES
                        # A slice of the next product begins before the first piece of its share, and the one before
                        # it has ended after the last piece.
                        if cutlass.const_expr(piece == 0 or part != (piece - 1) * SLICES // _PIECES):
                            ring.consumer_wait(read)
                            warpgroup.fence()
                            for k in cutlass.range_constexpr(SLICE // 16):
                                mma.set(warpgroup.Field.ACCUMULATE, part > 0 or k > 0)
                                cute.gemm(
                                    mma, following, of_queries[(None, None, k, part)],
                                    of_keys[(None, None, k, read.index)], following,
                                )  # fmt: skip
                            warpgroup.commit_group()
                            read.advance()

                        if cutlass.const_expr(piece == 0):  # the logits and the largest of the warp
                            inside = (base + COLS <= M) & (row - lane // 4 + 16 <= N)
                            hit = (t0 >= base) & (t0 < base + COLS) | (t1 >= base) & (t1 < base + COLS)
                            special = cute.arch.vote_any_sync(hit | (not inside))
                            for i in cutlass.range_constexpr(COLS // 2):
                                acc[i] = acc[i] * scale2
                            if special:
                                for i in cutlass.range_constexpr(COLS // 2):
                                    c = base + (lane % 4) * 2 + 8 * (i // 4) + i % 2
                                    target = t0 if cutlass.const_expr(i % 4 < 2) else t1
                                    r = row if cutlass.const_expr(i % 4 < 2) else row + 8
                                    if (c == target) & (c < M):
                                        positives[r] = acc[i]
                                    acc[i] = -Float32.inf if (c >= M) | (r >= N) else acc[i]
                            top = [acc[i] for i in range(8)]
                            for i in cutlass.range_constexpr(8, COLS // 2):
                                top[i % 8] = cute.arch.fmax(top[i % 8], acc[i])
                            for step in cutlass.range_constexpr(3):
                                for i in cutlass.range_constexpr(4 >> step):
                                    top[i] = cute.arch.fmax(top[i], top[i + (4 >> step)])
                            ref = cute.arch.fmax(top[0], Float32(_FINITE))
                            for step in cutlass.range_constexpr(5):
                                ref = cute.arch.fmax(ref, _other(ref, 1 << step))

                        if cutlass.const_expr(1 <= piece <= 4):  # a quarter of the exponentials
                            for j in cutlass.range_constexpr((piece - 1) * COLS // 32, piece * COLS // 32):
                                e = [_exp2_here(acc[4 * j + v] - ref) for v in range(4)]
                                part_sums0[j % 2] = part_sums0[j % 2] + (e[0] + e[1])
                                part_sums1[j % 2] = part_sums1[j % 2] + (e[2] + e[3])
                                sums.append(e[0] + e[2])
                                sums.append(e[1] + e[3])

                        if cutlass.const_expr(piece == 5):  # the eight lanes of a column exchange halves
                            if joins:
                                old_m = col_partials[0, plane, column]
                                old_z = col_partials[1, plane, column]
                            s0, s1 = part_sums0[0] + part_sums0[1], part_sums1[0] + part_sums1[1]
                            least = cute.arch.fmin(s0, s1)  # of four lanes' sums of these rows
                            for step in cutlass.range_constexpr(3):
                                width = len(sums) // 2
                                upper = (lane & (16 >> step)) != 0
                                kept = []
                                for i in cutlass.range_constexpr(width):
                                    given = sums[i] if upper else sums[width + i]
                                    own = sums[width + i] if upper else sums[i]
                                    kept.append(own + _other(given, 16 >> step))
                                sums = kept
                            for i in cutlass.range_constexpr(len(sums)):
                                least = cute.arch.fmin(least, sums[i])
                            lost = cute.arch.vote_any_sync(special | (least < _LEAST))

                        if cutlass.const_expr(piece == 6):
                            if cutlass.const_expr(self.stages > 6 * SLICES // _PIECES):
                                # Else who writes waits for a slice that all who still read have yet to free.
                                barrier.arrive_and_wait()
                            if lost:
                                a0, a1 = Float32(_FINITE), Float32(_FINITE)
                                for j in cutlass.range_constexpr(COLS // 8):
                                    a0 = cute.arch.fmax(a0, cute.arch.fmax(acc[4 * j], acc[4 * j + 1]))
                                    a1 = cute.arch.fmax(a1, cute.arch.fmax(acc[4 * j + 2], acc[4 * j + 3]))
                                s0, s1 = Float32(0.0), Float32(0.0)
                                for j in cutlass.range_constexpr(COLS // 8):
                                    s0 += _exp2(acc[4 * j] - a0) + _exp2(acc[4 * j + 1] - a0)
                                    s1 += _exp2(acc[4 * j + 2] - a1) + _exp2(acc[4 * j + 3] - a1)
                                n0, n1 = cute.arch.fmax(m0, a0), cute.arch.fmax(m1, a1)
                                z0 = z0 * _exp2(m0 - n0) + s0 * _exp2(a0 - n0)
                                z1 = z1 * _exp2(m1 - n1) + s1 * _exp2(a1 - n1)
                                m0, m1 = n0, n1
                                for i in cutlass.range_constexpr(COLS // 4):
                                    upper_row, lower_row = acc[i // 2 * 4 + i % 2], acc[i // 2 * 4 + i % 2 + 2]
                                    of_col = cute.arch.fmax(cute.arch.fmax(upper_row, lower_row), Float32(_FINITE))
                                    for step in cutlass.range_constexpr(3):
                                        of_col = cute.arch.fmax(of_col, _other(of_col, 4 << step))
                                    sum_of_col = _exp2(upper_row - of_col) + _exp2(lower_row - of_col)
                                    for step in cutlass.range_constexpr(3):
                                        sum_of_col = sum_of_col + _other(sum_of_col, 4 << step)
                                    if lane < 4:
                                        statistics[i // 2 * 8 + 2 * lane + i % 2, w, 0, group] = of_col
                                        statistics[i // 2 * 8 + 2 * lane + i % 2, w, 1, group] = sum_of_col
                            else:
                                n0, n1 = cute.arch.fmax(m0, ref), cute.arch.fmax(m1, ref)
                                z0 = z0 * _exp2(m0 - n0) + s0 * _exp2(ref - n0)
                                z1 = z1 * _exp2(m1 - n1) + s1 * _exp2(ref - n1)
                                m0, m1 = n0, n1
                                # Which of the sums of 2 COLS / 8 column pairs have come to this lane.
                                pair_of_sums = (lane // 16) * (COLS // 8) + (lane // 8 % 2) * (COLS // 16)
                                pair_of_sums += (lane // 4 % 2) * (COLS // 32)
                                for i in cutlass.range_constexpr(len(sums)):
                                    c = (pair_of_sums + i) // 2 * 8 + 2 * (lane % 4) + (pair_of_sums + i) % 2
                                    statistics[c, w, 0, group] = ref
                                    statistics[c, w, 1, group] = sums[i]
                            barrier.arrive_and_wait()

                        if cutlass.const_expr(piece == 7):
                            tops = [statistics[thread % 128, i, 0, group] for i in range(4)]
                            zs = [statistics[thread % 128, i, 1, group] for i in range(4)]
                            m = cute.arch.fmax(cute.arch.fmax(tops[0], tops[1]), cute.arch.fmax(tops[2], tops[3]))
                            m = cute.arch.fmax(m, old_m)
                            z = old_z * _exp2(old_m - m)
                            for i in cutlass.range_constexpr(4):
                                z += zs[i] * _exp2(tops[i] - m)
                            if column < M:
                                col_partials[0, plane, column] = m
                                col_partials[1, plane, column] = z
                            if ends:
                                for step in cutlass.range_constexpr(2):
                                    o0, o1 = _other(m0, 1 << step), _other(m1, 1 << step)
                                    y0, y1 = _other(z0, 1 << step), _other(z1, 1 << step)
                                    n0, n1 = cute.arch.fmax(m0, o0), cute.arch.fmax(m1, o1)
                                    z0 = z0 * _exp2(m0 - n0) + y0 * _exp2(o0 - n0)
                                    z1 = z1 * _exp2(m1 - n1) + y1 * _exp2(o1 - n1)
                                    m0, m1 = n0, n1
                                # The first cluster that has tiles of these rows has slot 0.
                                begin = pair * col_tiles
                                slot = cluster - begin // (each + 1)
                                if begin >= rest * (each + 1):
                                    slot = cluster - (rest + (begin - rest * (each + 1)) // each)
                                if (lane % 4 == 0) & (not past):
                                    if row < N:
                                        row_partials[0, slot, row] = m0
                                        row_partials[1, slot, row] = z0
                                    if row + 8 < N:
                                        row_partials[0, slot, row + 8] = m1
                                        row_partials[1, slot, row + 8] = z1
                                m0, m1 = Float32(_LOWEST), Float32(_LOWEST)
                                z0, z1 = Float32(0.0), Float32(0.0)
                                row += CLUSTER * ROWS
                                t0, t1 = Int32(-1), Int32(-1)
                                if row < N:
                                    t0 = Int32(targets[row])
                                if row + 8 < N:
                                    t1 = Int32(targets[row + 8])

                        if cutlass.const_expr(piece == _PIECES - 1 or (piece + 1) * SLICES // _PIECES != part):
                            # The accumulators change places: the last slice must have ended, too.
                            if cutlass.const_expr(part == SLICES - 1):
                                warpgroup.wait_group(0)
                                ring.consumer_release(free)
                                free.advance()
                            elif cutlass.const_expr(part > 0):
                                warpgroup.wait_group(1)
                            if cutlass.const_expr(part > 0):
                                ring.consumer_release(free)
                                free.advance()
                    col += 1
                    if last:
                        col = Int32(0)
                        pair += 1
            held.consumer_release(holding)


@functools.cache
def compiled(slices: int, dtype: torch.dtype) -> Any:
    """The kernel for features of one dtype, 64 x slices of them or up to 63 fewer. Compiles without a GPU, too, if
    CUTE_DSL_ARCH names one."""
    numbers = [Int32(1), Int32(1), Int32(8), Int64(8), Int64(8), *map(Int32, (1, 1, 1, 1, 0))]
    return cute.compile(Forward(slices), *_pointers([16] * 7, dtype), *numbers, make_fake_stream())


def _pointers(addresses: Sequence[int], dtype: torch.dtype) -> list[Any]:
    """Of queries, keys, targets, scale, row_partials, col_partials and positives."""
    features = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}[dtype]
    types = [(features, 16)] * 2 + [(Int64, 8)] + [(Float32, 4)] * 4
    return [
        make_ptr(of, address, cute.AddressSpace.gmem, assumed_align=align)
        for (of, align), address in zip(types, addresses, strict=True)
    ]


def partial_shapes(num_queries: int, num_keys: int, share: Share) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of row_partials and col_partials."""
    pairs, col_tiles = cdiv(num_queries, CLUSTER * ROWS), cdiv(num_keys, COLS)
    slots = min(cdiv(col_tiles, share.each) + 1, share.clusters)
    planes = min(pairs, share.clusters) * CLUSTER * 2
    return (2, slots, num_queries), (2, planes, num_keys)


def info_nce_forward(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    targets: Tensor | None,  # [N]
    query_groups: Tensor | None,
    key_groups: Tensor | None,
    symmetric: bool,
    label_smoothing: float,
    keep_products: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What info_nce_forward of the Triton kernels returns. The backward pass is theirs."""
    if targets is not None:
        require_targets("info_nce", targets, keys.shape[0], "keys")
    N, M = queries.shape[0], keys.shape[0]
    queries, keys = aligned(queries), aligned(keys)
    D = queries.shape[1]
    targets = torch.arange(N, device=queries.device) if targets is None else targets.contiguous()
    share = Share.of(N, M, chip_of(queries.device).multiprocessors)
    row_shape, col_shape = partial_shapes(N, M, share)
    positives = scale.new_empty(N)
    row_partials, col_partials = scale.new_zeros(row_shape), scale.new_empty(col_shape)
    row_partials[0] = _LOWEST  # no cluster may come to a slot
    with on_device(queries.device):
        tensors = (queries, keys, targets, scale, row_partials, col_partials, positives)
        compiled(cdiv(D, SLICE), queries.dtype)(
            *_pointers([x.data_ptr() for x in tensors], queries.dtype),
            N, M, D, queries.stride(0), keys.stride(0), row_shape[1], col_shape[1], *share,
            cuda.CUstream(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
        of = CrossEntropy(queries, keys, scale, None, targets, None, True, label_smoothing)
        found = finish_forward(of, targets, row_partials, col_partials, positives, col_shape[1], row_shape[1])
    return *found, scale.new_empty(0, N)
