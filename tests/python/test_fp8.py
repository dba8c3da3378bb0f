"""fp8 with block scales: into it, and back, through real sessions, against torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transfuse
from transfuse import Box, Dtype, FindingKind

if TYPE_CHECKING:
    from collections.abc import Iterable

DTYPES = {
    torch.float32: Dtype.F32,
    torch.bfloat16: Dtype.BF16,
    torch.float16: Dtype.F16,
    torch.float8_e4m3fn: Dtype.F8E4M3,
}
BLOCK = (128, 128)


def blocks(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def quantized(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """docs/fp8.md, one block at a time."""
    rows, columns = weight.shape
    numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(blocks((rows, columns), block), dtype=torch.float32)
    for i, j in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist():
        part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        held = weight[part].float()
        scale = held.abs().amax() / 448.0
        scale = torch.where(scale == 0, 1.0, scale)
        numbers[part] = (held / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales[i, j] = scale
    return numbers, scales


def dequantized(
    numbers: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return numbers.float() * spread[: numbers.shape[0], : numbers.shape[1]]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but for the sign and payload of NaN."""
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    nan = a.float().isnan()
    equal = a.view(as_integers) == b.view(as_integers)
    return torch.equal(nan, b.float().isnan()) and bool((equal | nan).all())


def awkward(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Blocks of very different sizes; one of zeros, one with subnormals of the dtype."""
    torch.manual_seed(7)
    weight = torch.randn(shape) * torch.randn(shape).exp()
    for i in range(0, shape[0], 64):
        for j in range(0, shape[1], 64):
            weight[i : i + 64, j : j + 64] *= 2.0 ** ((i // 64 * 5 + j // 64 * 3) % 17 - 8)
    weight[:128, :128] = 0
    weight[3, 5] = -0.0
    weight = weight.to(dtype)
    weight[128:256, :128] = torch.finfo(dtype).smallest_normal / 4
    return weight


class Side:
    """A layout and its memory, parameter by parameter."""

    def __init__(self, job: str | None = None, size_bytes: int = 0) -> None:
        self.builder = transfuse.LayoutBuilder()
        self.memory: dict[str, torch.Tensor] = {}
        self.arena = transfuse.Arena(size_bytes, job=job) if size_bytes else None

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        if self.arena is None:
            return torch.empty(tuple(shape), dtype=dtype)
        return self.arena.tensor(tuple(shape), dtype)

    def add(self, name: str, shape: tuple[int, ...], held: torch.Tensor, first_row: int = 0) -> int:
        tensor = self.builder.tensor(name, Dtype.BF16, shape)
        parameter = self.builder.parameter(name, DTYPES[held.dtype], held.numel())
        box = Box((first_row,) + (0,) * (len(shape) - 1), tuple(held.shape))
        self.builder.tile(tensor, box, parameter)
        self.memory[name] = held
        return tensor

    def fp8(self, shape: tuple[int, int], block: tuple[int, int]) -> None:
        numbers = self.empty(shape, torch.float8_e4m3fn)
        scales = self.empty(blocks(shape, block), torch.float32)
        self.builder.quantization(
            self.add("w", shape, numbers),
            self.add("w_scale_inv", tuple(scales.shape), scales),
            *block,
        )


def trainer(side: Side, job: str, name: str = "t0", count: int = 1) -> transfuse.Publisher:
    return transfuse.Publisher(
        side.builder.build(), side.memory, name=name, job=job, source_count=count
    )


def engine(side: Side, job: str) -> transfuse.Receiver:
    return transfuse.Receiver(side.builder.build(), side.memory, name="e0", job=job)


@pytest.mark.parametrize("mapped", [False, True], ids=["process_vm_readv", "memfd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [BLOCK, (64, 512)], ids=str)
def test_what_arrives_is_what_torch_makes_of_the_weights(job, dtype, mapped, block):
    shape = (300, 520)
    source, target = Side(job, 1 << 20 if mapped else 0), Side()
    held = source.empty(shape, dtype)
    source.add("w", shape, held)
    target.fp8(shape, block)
    with trainer(source, job) as publisher, engine(target, job) as receiver:
        for version in (1, 2):
            with publisher.write(version):
                held.copy_(awkward(shape, dtype) * version)
            report = receiver.refit(timeout_s=30)
            numbers, scales = quantized(held, block)
            assert same(target.memory["w"], numbers)
            assert same(target.memory["w_scale_inv"], scales)
            assert report.verified_bytes == report.size_bytes
            assert report.size_bytes == numbers.nbytes + scales.nbytes


def test_one_scale_for_a_whole_tensor(job):
    shape = (300, 520)
    source, target = Side(job, 1 << 20), Side()
    held = source.empty(shape, torch.float32)
    source.add("w", shape, held)
    target.fp8(shape, shape)
    with trainer(source, job) as publisher, engine(target, job) as receiver:
        with publisher.write(1):
            held.copy_(awkward(shape, torch.float32))
        receiver.refit(timeout_s=30)
        numbers, scales = quantized(held, shape)
        assert same(target.memory["w"], numbers)
        assert same(target.memory["w_scale_inv"], scales)


def test_a_block_that_no_buffer_holds_is_refused_where_memory_is_not_mapped(job):
    shape = (1024, 1024)
    source, target = Side(), Side()
    held = torch.ones(shape)
    source.add("w", shape, held)
    target.fp8(shape, shape)
    with trainer(source, job) as publisher, engine(target, job) as receiver:
        with publisher.write(1):
            pass
        with pytest.raises(transfuse.TransfuseError, match="1024x1024 elements that share a scale"):
            receiver.refit(timeout_s=5)


def test_weights_that_diverged_show_it(job):
    shape = (256, 256)
    source, target = Side(), Side()
    held = torch.ones(shape, dtype=torch.bfloat16)
    held[0, 0] = float("nan")
    held[200, 3] = float("-inf")
    source.add("w", shape, held)
    target.fp8(shape, BLOCK)
    with trainer(source, job) as publisher, engine(target, job) as receiver:
        with publisher.write(1):
            pass
        receiver.refit(timeout_s=30)
        numbers, scales = quantized(held, BLOCK)
        assert same(target.memory["w"], numbers)
        assert same(target.memory["w_scale_inv"], scales)
        assert (
            dequantized(target.memory["w"], target.memory["w_scale_inv"], BLOCK)[:, :128]
            .isnan()
            .all()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp8_with_its_scales_fills_what_is_not_fp8(job, dtype):
    shape = (300, 520)
    source, target = Side(job, 1 << 20), Side()
    source.fp8(shape, BLOCK)
    target.add("w", shape, torch.empty(shape, dtype=dtype))
    with trainer(source, job) as publisher, engine(target, job) as receiver:
        with publisher.write(1):
            every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
            numbers = every.repeat(-(-shape[0] * shape[1] // 256))[: shape[0] * shape[1]]
            source.memory["w"].copy_(numbers.view(shape))
            source.memory["w_scale_inv"].copy_(torch.randn(3, 5).exp())
        report = receiver.refit(timeout_s=30)
        wide = dequantized(source.memory["w"], source.memory["w_scale_inv"], BLOCK)
        assert same(target.memory["w"], wide.to(dtype))
        assert report.verified_bytes == report.size_bytes


def shards(job: str, shape: tuple[int, int], cuts: list[int]) -> list[Side]:
    sides = []
    for low, high in zip(cuts, cuts[1:], strict=False):
        side = Side()
        side.add("w", shape, awkward(shape, torch.bfloat16)[low:high].clone(), low)
        sides.append(side)
    return sides


def test_shards_of_whole_blocks_make_one_fp8(job):
    shape = (300, 520)
    target = Side()
    target.fp8(shape, BLOCK)
    sides = shards(job, shape, [0, 128, 256, 300])
    publishers = [trainer(side, job, f"t{i}", 3) for i, side in enumerate(sides)]
    with engine(target, job) as receiver:
        for publisher in publishers:
            with publisher.write(1):
                pass
        receiver.refit(timeout_s=30)
        numbers, scales = quantized(awkward(shape, torch.bfloat16), BLOCK)
        assert same(target.memory["w"], numbers)
        assert same(target.memory["w_scale_inv"], scales)
    for publisher in publishers:
        publisher.close()


def test_a_shard_that_cuts_a_block_is_refused(job):
    shape = (300, 520)
    target = Side()
    target.fp8(shape, BLOCK)
    sides = shards(job, shape, [0, 150, 300])
    layouts = [side.builder.build() for side in sides]
    layout = target.builder.build()
    findings = transfuse.diagnose(layout, layouts)
    assert {finding.kind for finding in findings} == {FindingKind.BLOCK}
    assert findings[0].box == Box((128, 0), (128, 520))
    assert 'block [128:256, 0:128] of tensor "w"' in findings[0].reason
    with pytest.raises(transfuse.LayoutMismatchError, match="which shares one scale"):
        transfuse.compile(layout, layouts)


def test_a_layout_says_which_scales_belong_to_which_tensor():
    side = Side()
    side.fp8((300, 520), BLOCK)
    layout = side.builder.build()
    (said,) = layout.quantizations
    assert (said.block_rows, said.block_columns) == BLOCK
    assert layout.tensors[said.scales].name == "w_scale_inv"
    again = transfuse.Layout.decode(layout.encode())
    assert again.quantizations == [said]
    plain = layout.with_quantizations([])
    assert plain != layout
    # As docs/fp8.md has it.
    pairs = [
        (t, plain.find_tensor(spec.name + "_scale_inv")) for t, spec in enumerate(plain.tensors)
    ]
    found = [transfuse.Quantization(t, s, 128, 128) for t, s in pairs if s is not None]
    assert plain.with_quantizations(found) == layout
    plan = transfuse.compile(layout, [layout])
    assert not any(run.quantizes for run in plan.runs)
    wide = Side()
    wide.add("w", (300, 520), torch.empty((300, 520), dtype=torch.bfloat16))
    bf16 = wide.builder.build()
    assert any(run.quantizes for run in transfuse.compile(layout, [bf16]).runs)
    assert all(holder.dequantizes for holder in transfuse.compile(bf16, [layout]).holders)
