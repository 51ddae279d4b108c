"""What the proof of wide offsets tells of Triton's code: `tests/scorecard/intervals.py`."""

import pytest

from tests.scorecard.intervals import Report, overflows


def found(*lines: str) -> Report:
    arguments = (
        "%x_ptr: !tt.ptr<f32>, %stride_xb: i32, %len_x: i32, %num_splits: i32, %num_items: i32, %size: i32"
    )
    return overflows("\n".join((f"tt.func public @kernel({arguments}) {{", *lines, "}")))


BATCH = ("%0 = tt.get_program_id x : i32", "%1 = arith.divsi %0, %num_splits : i32")
WIDE = ("%2 = arith.extsi %1 : i32 to i64", "%3 = arith.extsi %stride_xb : i32 to i64")


def test_a_product_in_64_bits_holds():
    offset = "%4 = arith.muli %2, %3 : i64"
    assert found(*BATCH, *WIDE, offset, "%5 = tt.addptr %x_ptr, %4 : !tt.ptr<f32>, i64") == Report(1, 1, [])


def test_a_product_in_32_bits_is_found_whatever_becomes_of_it():
    product = "%4 = arith.muli %1, %stride_xb : i32"
    for offset in ("%5 = arith.extsi %4 : i32 to i64", "%5 = arith.remsi %4, %num_splits : i32"):
        pointer = "%6 = tt.addptr %x_ptr, %5 : !tt.ptr<f32>, i64"
        assert product in found(*BATCH, product, offset, pointer).marks


def test_a_product_that_is_no_offset_is_no_matter():
    assert found(*BATCH, "%4 = arith.muli %1, %stride_xb : i32").marks == []


def test_rows_of_a_loop_are_bounded_by_its_end():
    loop = (
        "%c0 = arith.constant 0 : i32",
        "%c64 = arith.constant 64 : i32",
        "%4 = scf.for %start = %c0 to %len_x step %c64 iter_args(%a = %c0) -> (i32)  : i32 {",
        "%5 = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>",
        "%6 = tt.splat %start : i32 -> tensor<64xi32>",
        "%7 = arith.addi %5, %6 : tensor<64xi32>",
    )
    pointers = "%9 = tt.addptr %8, %7 : tensor<64x!tt.ptr<f32>>, tensor<64xi32>"
    assert found(*loop, pointers).marks == []
    squares = ("%7 = arith.muli %6, %6 : tensor<64xi32>", pointers)
    assert found(*loop[:-1], *squares).marks == [squares[0]]


def test_what_a_remainder_and_a_quotient_of_one_number_multiply_to_is_known():
    last = "%6 = tt.addptr %x_ptr, %5 : !tt.ptr<f32>, i32"
    remainder, product = "%2 = arith.remsi %0, %num_splits : i32", "%5 = arith.muli %1, %2 : i32"
    assert found(*BATCH, remainder, product, last).marks == []
    other = "%2 = arith.remsi %0, %num_items : i32"
    assert found(*BATCH, other, product, last).marks == [product]


@pytest.mark.parametrize("what", ["%size", "%nothing"])
def test_what_is_not_known_is_not_taken_for_small(what):
    assert found(f"%6 = tt.addptr %x_ptr, {what} : !tt.ptr<f32>, i32").marks == [f"{what} is not known"]
