"""Costs read from HLO written by hand, against arithmetic."""

from __future__ import annotations

import pytest

from dpo4rec_jax.rehearsal import costs, hlo

LOOP = """
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%layer_of_stack (p0: bf16[4,64,32], p1: s32[]) -> bf16[64,32] {
  %p0 = bf16[4,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,32]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %flat = bf16[64,32]{1,0} bitcast(%slice)
}

%body (state: STATE) -> STATE {
  %state = STATE parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[16,64]{1,0} get-tuple-element(%state), index=1
  %stack = bf16[4,64,32]{2,1,0} get-tuple-element(%state), index=2
  %one = s32[] get-tuple-element(%state), index=3
  %w = bf16[64,32]{1,0} fusion(%stack, %i), kind=kLoop, calls=%layer_of_stack
  %part = bf16[16,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %whole = bf16[16,64]{1,0} all-gather(%part), replica_groups=[4,2]<=[8], dimensions={1}
  %total = bf16[16,64]{1,0} all-reduce(%whole), replica_groups=[2,4]<=[4,2]T(1,0), O_PRODUCT
  %next = s32[] add(%i, %one)
  ROOT %out = STATE tuple(%next, %total, %stack, %one)
}

%condition (state.1: STATE) -> pred[] {
  %state.1 = STATE parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(4)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: bf16[16,64], w.1: bf16[4,64,32]) -> bf16[16,64] {
  %x.1 = bf16[16,64]{1,0} parameter(0)
  %w.1 = bf16[4,64,32]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %step = s32[] constant(1)
  %state.2 = STATE tuple(%start, %x.1, %w.1, %step)
  %loop = STATE while(%state.2), condition=%condition, body=%body
  ROOT %result = bf16[16,64]{1,0} get-tuple-element(%loop), index=1
}
""".replace("STATE", "(s32[], bf16[16,64]{1,0}, bf16[4,64,32]{2,1,0}, s32[])").replace(
    "O_PRODUCT", 'to_apply=%add, metadata={op_name="jit(f)/o/dot_general"}'
)
TURNS = 4


def of(text: str) -> costs.Costs:
    return costs.costs_of(hlo.parse(text))


def test_a_loop_counts_as_often_as_it_turns() -> None:
    assert of(LOOP).flops == TURNS * 2 * 16 * 64 * 32


def test_a_known_number_of_turns_is_believed() -> None:
    known = LOOP.replace(
        "body=%body",
        'body=%body, backend_config={"known_trip_count":{"n":"7"},"known_init_step":{}}',
    )
    assert of(known).flops == 7 * 2 * 16 * 64 * 32


def test_a_loop_that_data_ends_counts_once_and_is_named() -> None:
    found = of(LOOP.replace("%limit = s32[] constant(4)", "%limit = s32[] add(%i.1, %i.1)"))
    assert found.flops == 2 * 16 * 64 * 32
    assert found.unknown == {"loop"}


def test_a_bound_may_be_handed_in_with_the_state() -> None:
    handed = (
        LOOP.replace(
            "%limit = s32[] constant(4)", "%limit = s32[] get-tuple-element(%state.1), index=3"
        )
        .replace("add(%i, %one)", "add(%i, %i.2)")
        .replace("%one = s32[] get", "%i.2 = s32[] constant(1)\n  %one = s32[] get")
    )
    handed = handed.replace("%step = s32[] constant(1)", "%step = s32[] constant(5)")
    assert of(handed).flops == 5 * 2 * 16 * 64 * 32


def test_an_unrolled_loop_turns_half_as_often() -> None:
    unrolled = LOOP.replace("%step = s32[] constant(1)", "%step = s32[] constant(2)")
    assert of(unrolled).flops == TURNS / 2 * 2 * 16 * 64 * 32


def test_collectives_are_of_whole_arrays_and_their_groups() -> None:
    gather, reduce = of(LOOP).collectives
    assert (gather.kind, gather.times, gather.bytes) == ("all-gather", TURNS, 16 * 64 * 2)
    assert gather.groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert (reduce.kind, reduce.times, reduce.bytes) == ("all-reduce", TURNS, 16 * 64 * 2)
    assert reduce.groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert reduce.origin == "jit(f)/o/dot_general"


def summed_twice(origin: str) -> str:
    """The loop with a second all-reduce of its result, both of channel 1."""
    first = 'O_PRODUCT, channel_id=1, metadata={op_name="o"}\n'
    again = f'channel_id=1, to_apply=%add, metadata={{op_name="{origin}"}}\n'
    second = "  %again = bf16[16,64]{1,0} all-reduce(%total), replica_groups=[2,4]<=[4,2]T(1,0), "
    plain = 'to_apply=%add, metadata={op_name="jit(f)/o/dot_general"}\n'
    return LOOP.replace(plain, first.replace("O_PRODUCT", "to_apply=%add") + second + again)


@pytest.mark.parametrize(("origin", "sums"), [("o", 1), ("down", 2)])
def test_parts_of_one_collective_count_once_and_others_of_its_channel_apart(origin, sums) -> None:
    reduces = [each for each in of(summed_twice(origin)).collectives if each.kind == "all-reduce"]
    assert len(reduces) == sums


def test_traffic_is_what_is_read_and_written_and_of_a_stack_one_layer() -> None:
    layer, part, whole, counter = 64 * 32 * 2, 16 * 32 * 2, 16 * 64 * 2, 4
    sliced = layer + counter + layer  # the stack's slice and index, and the copy of it
    product = whole + layer + part
    collectives = (part + whole) + (whole + whole)
    assert of(LOOP).bytes == TURNS * (sliced + product + collectives + 3 * counter)


def test_what_lies_in_on_chip_memory_is_no_traffic() -> None:
    near = LOOP.replace("%w = bf16[64,32]{1,0} fusion", "%w = bf16[64,32]{1,0:S(1)} fusion")
    saved = 2 * 64 * 32 * 2  # neither written by the slice nor read by the product
    assert of(LOOP).bytes - of(near).bytes == TURNS * saved


def convolution(operands: str, shapes: tuple[str, str, str], attributes: str) -> float:
    left, right, out = shapes
    return of(
        f"ENTRY %main (a: {left}, b: {right}) -> {out} {{\n"
        f"  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n"
        f"  ROOT %c = {out} convolution({operands}), {attributes}\n}}\n"
    ).flops


def test_a_product_written_as_convolution_counts_as_a_product() -> None:
    shapes = ("bf16[16,64]", "bf16[64,32]", "bf16[16,32]")
    assert convolution("%a, %b", shapes, "dim_labels=bf_io->bf") == 2 * 16 * 64 * 32


def test_a_batched_product_written_as_convolution_counts_no_holes() -> None:
    """8 products of 16 x 64 by 64 x 32: the batch is a dimension dilated so that each position
    meets its own kernel alone."""
    shapes = ("bf16[8,16,64]", "bf16[8,64,32]", "bf16[8,16,32]")
    window = "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf"
    assert convolution("%a, %b", shapes, window) == 8 * 2 * 16 * 64 * 32


def test_a_padded_convolution_counts_no_padding() -> None:
    """3 taps over 10 positions, padded by 1: the two ends miss a tap each."""
    shapes = ("f32[1,10,4]", "f32[3,4,6]", "f32[1,10,6]")
    window = "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"
    assert convolution("%a, %b", shapes, window) == 2 * 4 * 6 * (3 * 10 - 2)


@pytest.mark.parametrize(
    ("spelling", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['data'=2,'tensor'=2] {'data'}", ((0, 2), (1, 3))),
        (
            "replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}",
            ((0, 1), (2, 3)),
        ),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1),)),
    ],
)
def test_groups_are_read_in_every_spelling(spelling: str, groups: tuple) -> None:
    assert costs.replica_groups(f", channel_id=1, {spelling}, use_global_device_ids=true") == groups


def test_metadata_of_several_lines_belong_to_their_instruction() -> None:
    kernel = '%kernel = bf16[16,32]{1,0} custom-call(%x, %w), metadata={\n"a": {\n}}, more={}\n'
    assert of(LOOP.replace("  %part =", f"  {kernel}  %part =")).flops == of(LOOP).flops


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.parse("HloModule nothing")
