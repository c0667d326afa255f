"""The model of the scheduler on small programs whose clocks are known by hand."""

import pytest

pytest.importorskip("triton")

from benchmarks.issue_model import flow, gcn, model, pipes, predict, sass
from benchmarks.issue_model.sass import NONE, Code, Instruction

H100 = pipes.CHIPS["sm_90"]

# From a real kernel: `nvdisasm -c -hex`, shortened.
LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
                                                                            /* 0x000e700000000800 */
.L_x_1:
        /*0010*/              @!P3 BRA `(.L_x_1) ;                          /* 0xfffffff80058b947 */
                                                                            /* 0x002fec000383ffff */
"""


def an(text: str, stall: int = 1, sets: int = NONE, waits: tuple[int, ...] = (), predicate: str = "") -> Instruction:
    target = text.split("`")[1] if "`" in text else ""
    return Instruction(predicate, text.split()[0], text, target, stall, sets, NONE, waits)


def clocks(path: list[Instruction], warps: int = 1, blocks: int = 1) -> float:
    """When the last instruction issues; the first does at 0."""
    return max(model.issue(model.steps_of(path, H100), H100, warps, blocks))


def test_a_listing_is_read():
    code = sass.parse(LISTING)
    load, jump = code.instructions
    assert (load.opcode, load.predicate, load.stall, load.sets, load.waits) == ("LDC", "", 8, 1, ())
    assert (jump.name, jump.predicate, jump.target, jump.sets, jump.waits) == ("BRA", "!P3", ".L_x_1", NONE, (1,))
    assert code.labels == {".L_x_1": 1}


def test_a_path_passes_products_loops_and_a_store_by_the_shortest_way():
    code = Code(
        [
            an("MOV R0, R1"),  # 0
            an("BRA `loop_end", predicate="P0"),  # 1: past the loop
            an("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"),  # 2: the loop
            an("BRA `loop", predicate="P1"),  # 3
            an("BRA `long", predicate="P2"),  # 4: two ways
            an("FADD R0, R0, R1"),  # 5: the short one
            an("BRA `joined"),  # 6
            an("FADD R0, R0, R1"),  # 7: the long one
            an("FADD R0, R0, R1"),
            an("FADD R0, R0, R1"),
            an("BRA `more", predicate="P3"),  # 10: past the store
            an("STG.E.128 [R2], R4"),  # 11
            an("BRA `end", predicate="P4"),  # 12: past what stores more
            an("STG.E.128 [R2], R4"),  # 13
            an("EXIT"),  # 14
            an("FADD R0, R0, R1"),  # 15: a handler that jumps back into the path is no loop
            an("BRA `joined"),
        ],
        {"loop": 2, "loop_end": 4, "long": 7, "joined": 10, "more": 12, "end": 14},
    )
    found = flow.Flow(code)
    (loop,) = found.loops
    assert found.innermost_with_matrix() == [loop]
    ranges = [(part.first, part.end, part.loop is not None) for part in found.path(None)]
    assert ranges == [(0, 2, False), (2, 4, True), (4, 7, False), (10, 13, False), (14, 15, False)]


def test_a_loop_may_be_left_by_a_conditional_exit():
    code = Code(
        [
            an("MOV R0, R1"),
            an("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"),  # 1: the loop
            an("STG.E.128 [R2], R4"),
            an("EXIT", predicate="P0"),
            an("BRA `loop"),  # 4
        ],
        {"loop": 1},
    )
    ranges = [(part.first, part.end, part.loop is not None) for part in flow.Flow(code).path(None)]
    assert ranges == [(0, 1, False), (1, 4, True)]


def test_a_path_works_on_every_element():
    code = Code(
        [
            an("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"),  # 0
            an("BRA `else", predicate="P5"),  # 1
            *[an("MUFU.EX2 R0, R0")] * 3,  # 2: the plain way
            an("BRA `end", predicate="!P5"),  # 5
            an("BRA `end", predicate="P3"),  # 6: else, which the code does not know to be the other way always
            *[an("MUFU.EX2 R0, R0")] * 8,  # 7: the exact way
            an("STG.E.128 [R2], R4"),  # 15
            an("EXIT"),
        ],
        {"else": 6, "end": 15},
    )
    found = flow.Flow(code)
    assert [(part.first, part.end) for part in found.path(None, elements=3)] == [(0, 6), (15, 17)]
    assert [(part.first, part.end) for part in found.path(None)] == [(0, 2), (6, 7), (15, 17)]


FLATTENED = Code(
    [
        an("BRA `same", predicate="P0"),  # 0: the loop; past the addresses of another tile
        *[an("IMAD R0, R0, R1")] * 5,  # 1
        an("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"),  # 6: same
        an("BRA `on", predicate="P1"),  # 7: past the epilogue
        an("BRA `plain", predicate="P2"),  # 8
        *[an("IADD3 R0, R0, R1")] * 9,  # 9: the rare way
        *[an("MUFU.EX2 R0, R0")] * 4,  # 18: plain
        an("STG.E.128 [R2], R4"),  # 22
        an("BRA `loop", predicate="P3"),  # 23: on
        an("EXIT"),
    ],
    {"loop": 0, "same": 6, "plain": 18, "on": 23},
)


def test_one_loop_over_tiles_and_their_steps_has_addresses_and_an_epilogue_once_a_tile():
    found = flow.Flow(FLATTENED)
    (loop,) = found.loops
    assert found.flattened([loop], elements=4) == loop
    assert found.flattened([loop], elements=5) is None  # no trip works on so many
    tile = predict.tile_of(FLATTENED, H100, predict.Shape(warps=4, blocks=1, steps=3, elements=4))
    assert tile.steps == 3
    assert tile.step.named == {"BRA": 3, "HGMMA": 1}
    assert tile.rest.named == {"IMAD": 5, "BRA": 1, "MUFU": 4, "STG": 1}
    assert tile.flops == 3 * 2 * 64 * 128 * 16
    assert tile.clocks["matrix"] == 3 * 64


def test_a_loop_that_stores_in_every_trip_is_not_over_tiles_and_steps():
    code = Code(
        [
            an("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"),
            *[an("MUFU.EX2 R0, R0")] * 4,
            an("STG.E.128 [R2], R4"),
            an("BRA `loop", predicate="P3"),
            an("EXIT"),
        ],
        {"loop": 0},
    )
    found = flow.Flow(code)
    assert found.flattened(found.loops, elements=4) is None


def test_a_stall_and_a_scoreboard_hold_a_warp():
    assert clocks([an("FADD R0, R0, R1", stall=4), an("FADD R0, R0, R1")]) == 4
    # 8 clocks of the special function unit, 24 until the result is there.
    assert clocks([an("MUFU.EX2 R0, R0", sets=0), an("FADD R0, R0, R1", waits=(0,))]) == 32


def test_warps_share_issue_and_pipes():
    one = [an("FADD R0, R0, R1")]
    assert clocks(one * 10, warps=1) == 9
    assert clocks(one * 10, warps=4) == 39  # an instruction a clock
    assert clocks([an("MUFU.EX2 R0, R0")] * 2, warps=2) == 24  # the fourth of 8 clocks each
    # A warp that waits leaves its clocks to the other.
    assert clocks([an("FADD R0, R0, R1", stall=10)] * 2, warps=2) == 11


def test_all_warps_of_a_block_meet_at_a_barrier():
    path = [an("FADD R0, R0, R1", stall=10), an("BAR.SYNC.DEFER_BLOCKING 0x0"), an("FADD R0, R0, R1")]
    # The second warp arrives at 11; both go on 14 clocks later, one after the other.
    assert clocks(path, warps=2) == 26


def test_products_of_a_warp_group_run_beside_the_warp_until_it_waits():
    product = an("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0")
    assert pipes.use(product, H100).clocks == 64  # 64 * 128 * 16 * 2 / 4096
    work = [an("FADD R0, R0, R1")] * 50
    wait = an("WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert clocks([product, *work]) == 50
    assert clocks([product, *work, wait, an("FADD R0, R0, R1")]) == 64 + 32
    # One group may still run.
    assert clocks([product, product, an("WARPGROUP.DEPBAR.LE gsb0, 0x1"), an("FADD R0, R0, R1")]) == 64 + 32


def test_copies_arrive_after_the_latency_of_l2_and_at_its_width():
    copy, end = an("LDGSTS.E.BYPASS.128 [R0], [R2.64]"), an("LDGDEPBAR")
    wait, use = an("DEPBAR.LE SB0, 0x0"), an("FADD R0, R0, R1")
    alone = clocks([copy, end, wait, use])
    assert alone == pytest.approx(4 * 512 / H100.l2_bytes + H100.l2_latency, abs=1)
    many = clocks([copy] * 8 + [end, wait, use])
    assert many - alone == pytest.approx(7 * 4 * 512 / H100.l2_bytes, abs=1)


def test_an_unknown_instruction_is_an_error():
    with pytest.raises(KeyError, match="FROB"):
        pipes.use(an("FROB R0"), H100)


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("HGMMA.64x256x16.F32", 2 * 64 * 256 * 16 / 4),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", 2 * 64 * 128 * 32 / 4),
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("UTCHMMA", 0),
    ],
)
def test_the_products_of_an_instruction(opcode, flops):
    assert pipes.product_flops(an(opcode)) == flops


def test_products_of_sm_100_are_waited_for_at_barriers_in_memory():
    B200 = pipes.CHIPS["sm_100"]
    product, end = an("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]"), an("UTCBAR [UR9], URZ")
    wait, use = an("SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR9], R4"), an("FADD R0, R0, R1")
    flops = 100 * B200.matrix / 4  # 100 clocks of a scheduler's share

    def end_of(path: list[Instruction]) -> float:
        return model.issue(model.steps_of(path, B200, flops), B200, warps=1)[0]

    # The first wait is for the product before, the second for the last.
    assert end_of([product, end, product, end, wait, use]) == 100 + 32
    assert end_of([product, end, product, end, wait, wait, use]) == 200 + 32
    # The first trip of the loop stands before it.
    code = Code(
        [product, end, product, end, wait, an("BRA `loop", predicate="P1"), wait, an("EXIT")],
        {"loop": 2},
    )
    tile = predict.tile_of(code, B200, predict.Shape(4, 1, steps=8, shapeless_flops=flops))
    assert (tile.steps, tile.clocks["matrix"]) == (7, 800)


def test_a_tile_counts_its_main_loop_and_the_rest():
    code = Code(
        [
            an("MOV R0, R1"),
            an("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"),
            an("WARPGROUP.DEPBAR.LE gsb0, 0x0"),
            an("BRA `loop", predicate="P1"),
            an("MUFU.EX2 R0, R0"),
            an("EXIT"),
        ],
        {"loop": 1},
    )
    tile = predict.tile_of(code, H100, predict.Shape(warps=8, blocks=1, steps=10))
    assert (tile.step.instructions, tile.rest.instructions, tile.rest.named["MUFU"]) == (3, 3, 1)
    assert tile.flops == 10 * 2 * 2 * 64 * 128 * 16  # two warp groups
    assert tile.clocks["matrix"] == 10 * 2 * 64
    assert tile.clocks["issue"] == 2 * (10 * 3 + 3)
    assert tile.cycles > tile.bound()[0] == tile.clocks["matrix"]


MI300X = pipes.CHIPS["gfx942"]

# From the compiler's assembly, shortened.
GCN_LISTING = """
	.text
kernel:
.LBB0_0:
	s_load_dwordx2 s[0:1], s[2:3], 0x8     ; the pointers
	s_cbranch_execz .LBB0_2
; %bb.1:
	global_load_dwordx4 v[0:3], v[4:5], off
.LBB0_2:                                ; Parent Loop
	s_waitcnt vmcnt(0) lgkmcnt(1)
	s_nop 3
	s_cbranch_scc1 .LBB0_2
	s_branch .LBB0_0
	s_endpgm
	.section	.rodata,"a",@progbits
	v_mov_b32_e32 v0, v1
"""


def gcn_an(text: str) -> Instruction:
    (instruction,) = gcn.parse(f"\t{text}\n").instructions
    return instruction


def gcn_clocks(*texts: str, warps: int = 1) -> float:
    path = [gcn_an(text) for text in texts]
    return max(model.issue(model.steps_of(path, MI300X), MI300X, warps))


def test_a_listing_of_amd_is_read():
    code = gcn.parse(GCN_LISTING)
    assert [i.opcode for i in code.instructions] == [
        "s_load_dwordx2", "s_cbranch_execz", "global_load_dwordx4", "s_waitcnt", "s_nop", "BRA", "BRA", "EXIT",
    ]  # fmt: skip
    assert code.labels == {".LBB0_0": 0, ".LBB0_2": 3}
    assert [(i.predicate, i.target) for i in code.instructions[5:7]] == [("scc1", ".LBB0_2"), ("", ".LBB0_0")]
    assert gcn.counts(code.instructions[3]) == (0, 1)
    assert code.instructions[4].stall == 16
    # Nothing is done by no lane in an inner tile: the jump past a load is none.
    found = flow.Flow(code)
    assert [(block.first, block.end) for block in found.blocks] == [(0, 3), (3, 6), (6, 7), (7, 8)]
    assert len(found.loops) == 2


@pytest.mark.parametrize(
    ("text", "pipe", "clocks"),
    [
        ("v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]", "matrix", 32),  # 8 passes
        ("v_mfma_f32_16x16x16_f16 a[0:3], v[16:17], v[18:19], a[0:3]", "matrix", 16),
        ("v_mfma_f32_32x32x2_f32 a[0:15], v0, v1, a[0:15]", "matrix", 64),
        ("v_mfma_f32_16x16x4_f32 a[0:3], v0, v1, a[0:3]", "matrix", 32),
        ("v_mfma_f32_32x32x16_fp8_fp8 a[0:15], v[0:1], v[2:3], a[0:15]", "matrix", 32),
        ("v_exp_f32_e32 v0, v1", "alu", 16),
        ("v_mul_lo_u32 v0, v1, v2", "alu", 16),
        ("v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]", "alu", 4),
        ("ds_read_b64 v[0:1], v2 offset:64", "lsu", 16),
        ("ds_read2st64_b64 v[0:3], v4 offset1:8", "lsu", 32),
        ("ds_write_b128 v0, v[2:5]", "lsu", 32),
        ("global_load_dwordx4 v[0:3], v[4:5], off", "memory", 64),
        ("buffer_load_ushort v0, v1, s[0:3], 0 offen", "memory", 16),
        ("s_add_i32 s0, s1, s2", "scalar", 4),
    ],
)
def test_what_an_instruction_of_amd_takes(text, pipe, clocks):
    taken = pipes.use(gcn_an(text), MI300X)
    assert (taken.pipe, taken.clocks) == (pipe, clocks)


def test_waves_share_a_simd():
    add = "v_add_f32_e32 v0, v0, v1"
    assert gcn_clocks(*[add] * 10) == gcn_clocks(*[add] * 5, warps=2) == 36
    # The scalar unit works beside the vector unit, on another wave.
    assert gcn_clocks(*[add, "s_add_i32 s0, s0, s1"] * 5, warps=2) < gcn_clocks(*[add] * 10, warps=2)
    product = "v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]"
    assert gcn_clocks(product, *[add] * 7) == 28  # beside the product
    assert gcn_clocks(product, product, add) == 32 + 4


def test_a_wait_is_for_the_oldest_loads():
    load, use = "global_load_dwordx4 v[0:3], v[4:5], off", "v_add_f32_e32 v0, v0, v1"
    alone = gcn_clocks(load, "s_waitcnt vmcnt(0)", use)
    # 16 clocks of the port for 1,024 bytes from all SIMDs, or of L2's width, and its latency.
    assert alone == pytest.approx(4 * 1024 / MI300X.l2_bytes + MI300X.l2_latency, abs=4)
    assert gcn_clocks(load, load, "s_waitcnt vmcnt(1)", use) == alone
    assert gcn_clocks(load, load, "s_waitcnt vmcnt(0)", use) > alone + 60
    assert gcn_clocks(load, "s_waitcnt lgkmcnt(0)", use) == 8
    assert gcn_clocks("ds_read_b64 v[0:1], v2", "s_waitcnt lgkmcnt(0)", use) == pytest.approx(16 + 120, abs=4)


def test_a_tile_of_amd_counts_the_trips_before_and_after_its_loop():
    product = "v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]"
    lines = [product, ".LBB0_1:", product, "s_cbranch_scc1 .LBB0_1", product, "v_exp_f32_e32 v0, v1", "s_endpgm"]
    code = gcn.parse("\n".join(line if line.startswith(".") else f"\t{line}" for line in lines))
    tile = predict.tile_of(code, MI300X, predict.Shape(warps=8, blocks=1, steps=10))
    assert tile.steps == 8
    assert tile.flops == 10 * 8 * 2 * 32 * 32 * 8
    assert tile.clocks["matrix"] == 10 * 2 * 32
    assert tile.rest.named["MUFU"] == 1


@pytest.mark.parametrize("large", [0, 1])
def test_of_two_nests_that_exclude_each_other_the_one_of_the_larger_product_counts(large):
    """triplet's kernels work in quarters of a tile where a feature is not finite; AMD's compiler puts those first."""
    products = ["v_mfma_f32_16x16x16_bf16 v[0:3], v[16:17], v[18:19], v[0:3]"] * 2
    products[large] = "v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]"
    lines = ["s_cbranch_scc0 .LBB0_3"]
    for nest, product in enumerate(products):
        first = 1 + 2 * nest
        lines += [f".LBB0_{first}:", "v_add_f32 v0, v1, v2", f".LBB0_{first + 1}:", product]
        lines += [f"s_cbranch_scc1 .LBB0_{first + 1}", "global_store_dword v[0:1], v2, off"]
        lines += [f"s_cbranch_scc1 .LBB0_{first}", "s_endpgm"]
    code = gcn.parse("\n".join(line if line.startswith(".") else f"\t{line}" for line in lines))
    tile = predict.tile_of(code, MI300X, predict.Shape(warps=8, blocks=1, steps=10))
    assert tile.flops == 10 * 8 * 2 * 32 * 32 * 8


def test_an_unknown_instruction_of_amd_is_an_error():
    with pytest.raises(KeyError, match="frob"):
        pipes.use(Instruction("", "frob", "frob", "", 4, NONE, NONE, ()), MI300X)
