"""Boxes, layouts and their codec as Python sees them."""

from __future__ import annotations

import pytest
import transfuse
from transfuse import Box, Dtype, LayoutBuilder, TensorSpec


def matrix_layout(name="w", shape=(4, 6), dtype=Dtype.F32):
    builder = LayoutBuilder()
    tensor = builder.tensor(name, dtype, shape)
    parameter = builder.parameter(name, dtype, shape[0] * shape[1])
    builder.tile(tensor, Box.whole(shape), parameter)
    return builder.build()


def test_dtypes_know_their_size_and_name():
    assert Dtype.parse("bf16") is Dtype.BF16
    assert [d.size_bytes for d in Dtype] == [4, 2, 2, 1, 1, 1, 1, 4, 8]
    assert [Dtype.parse(d.text) for d in Dtype] == list(Dtype)


def test_a_cast_is_allowed_where_a_refit_can_make_it():
    assert transfuse.castable(Dtype.F32, Dtype.BF16)
    assert transfuse.castable(Dtype.BF16, Dtype.F32)
    assert not transfuse.castable(Dtype.BF16, Dtype.F16)


def test_boxes_are_values():
    box = Box((0, 2), (4, 4))
    assert box == Box([0, 2], [4, 4])
    assert hash(box) == hash(Box((0, 2), (4, 4)))
    assert (box.offset, box.length, box.element_count) == ((0, 2), (4, 4), 16)
    assert repr(box) == "Box([0:4, 2:6])"
    assert box.intersect(Box((1, 0), (2, 3))) == Box((1, 2), (2, 1))
    assert box.intersect(Box((0, 0), (4, 2))) is None


def test_a_box_of_two_ranks_is_refused():
    with pytest.raises(transfuse.InvalidArgumentError, match="2 dimensions.* 1"):
        Box((0, 0), (4,))
    with pytest.raises(transfuse.InvalidArgumentError):
        Box((0, 0), (1, 1)).intersect(Box((0,), (1,)))


def test_dims_beyond_the_largest_rank_are_refused():
    with pytest.raises(TypeError):
        Box.whole((1,) * (transfuse.MAX_RANK + 1))


def test_a_layout_tells_what_it_was_built_from():
    layout = matrix_layout()
    assert layout.tensors == [TensorSpec("w", Dtype.F32, (4, 6))]
    assert layout.parameters[0].size_bytes == 96
    assert layout.tiles[0].box == Box.whole((4, 6))
    assert layout.tiles[0].element_strides == (6, 1)
    assert (layout.find_tensor("w"), layout.find_tensor("v")) == (0, None)
    assert layout.tile_bytes == layout.parameter_bytes == 96


def test_equal_layouts_are_equal_and_survive_the_wire():
    layout = matrix_layout()
    again = transfuse.Layout.decode(layout.encode())
    assert again == layout
    assert hash(again) == hash(layout)
    assert again.digest == layout.digest
    assert len(str(layout.digest)) == 32
    assert layout != matrix_layout(name="v")
    assert layout != "w"


def test_every_truncated_encoding_is_corrupt():
    data = matrix_layout().encode()
    for length in range(len(data)):
        with pytest.raises(transfuse.CorruptError):
            transfuse.Layout.decode(data[:length])


def test_a_handle_of_another_builder_is_refused():
    builder = LayoutBuilder()
    parameter = builder.parameter("w", Dtype.F32, 24)
    with pytest.raises(transfuse.InvalidArgumentError, match="tensor handle 7"):
        builder.tile(7, Box.whole((4, 6)), parameter)


def test_a_tile_beyond_its_parameter_is_refused():
    builder = LayoutBuilder()
    tensor = builder.tensor("w", Dtype.F32, (4, 6))
    parameter = builder.parameter("w", Dtype.F32, 23)
    builder.tile(tensor, Box.whole((4, 6)), parameter)
    with pytest.raises(transfuse.LayoutMismatchError, match="w"):
        builder.build()


def test_a_transposed_tile_has_its_own_strides():
    builder = LayoutBuilder()
    tensor = builder.tensor("w", Dtype.F32, (4, 6))
    parameter = builder.parameter("w", Dtype.F32, 24)
    builder.tile(tensor, Box.whole((4, 6)), parameter, 0, (1, 4))
    assert builder.build().tiles[0].element_strides == (1, 4)
