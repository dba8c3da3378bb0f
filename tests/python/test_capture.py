"""transfuse.capture: what a loader does becomes a layout, and nothing happens to the engine.

The judge is the loader itself, run with real tensors: a plan into the captured layout must write
what it wrote.
"""

from __future__ import annotations

import random

import pytest
import torch
import transfuse
from transfuse import Box, Dtype, LayoutMismatchError, TensorSpec

NAMES = {
    Dtype.F32: torch.float32,
    Dtype.F16: torch.float16,
    Dtype.BF16: torch.bfloat16,
    Dtype.I32: torch.int32,
}
F32 = Dtype.F32


def specs(**shapes):
    return [TensorSpec(name, F32, shape) for name, shape in shapes.items()]


def numbers(catalog):
    """Every element has a value of its own."""
    values, first = {}, 1
    for spec in catalog:
        count = torch.Size(spec.shape).numel()
        values[spec.name] = torch.arange(first, first + count, dtype=NAMES[spec.dtype]).view(
            spec.shape
        )
        first += count
    return values


def whole(catalog, dtypes=()):
    """The layout of a source that holds every tensor as it is."""
    builder, dtypes = transfuse.LayoutBuilder(), dict(dtypes)
    for spec in catalog:
        tensor = builder.tensor(spec.name, spec.dtype, spec.shape)
        count = torch.Size(spec.shape).numel()
        dtype = dtypes.get(spec.name, spec.dtype)
        builder.tile(tensor, Box.whole(spec.shape), builder.parameter(spec.name, dtype, count))
    return builder.build()


class Engine:
    """Parameters, and a loader of one function for each catalog tensor."""

    def __init__(self, parameters, **rules):
        self.parameters = {name: value.clone() for name, value in parameters.items()}
        self.rules = rules

    def load_weights(self, weights):
        for name, tensor in weights:
            self.rules[name](self.parameters, tensor)


def check(execute, engine, catalog, **options):
    """Captures, and compares a plan and the loader. Returns what was captured."""
    before = {name: value.clone() for name, value in engine.parameters.items()}
    captured = transfuse.capture(engine.load_weights, engine.parameters, catalog, **options)
    for name, value in engine.parameters.items():
        assert torch.equal(value, before[name]), f"{name} was written by the capture"
    values = numbers(catalog)
    source = whole(catalog)
    held = {}
    for parameter in captured.layout.parameters:
        memory = captured.parameters[parameter.name]
        assert memory.is_contiguous()
        held[parameter.name] = memory.flatten().clone()
        assert memory.numel() == parameter.element_count
    plan = transfuse.compile(captured.layout, [source])
    for fill in captured.layout.fills:
        name = captured.layout.parameters[fill.parameter].name
        held[name].as_strided(fill.length, fill.element_strides, fill.element_offset).zero_()
    execute(plan, [(source, {n: v.flatten() for n, v in values.items()})], held)
    for name, value in held.items():
        captured.parameters[name].view(-1).copy_(value)
    for hook in captured.after_commit.values():
        hook()
    got = {name: value.clone() for name, value in engine.parameters.items()}
    for name, value in engine.parameters.items():
        value.copy_(before[name])
    engine.load_weights(iter(values.items()))
    for name, value in engine.parameters.items():
        assert torch.equal(got[name], value), f"{name}\n{got[name]}\n{value}"
    return captured


def ways(captured):
    return {tensor.name: tensor.way for tensor in captured.report.tensors}


def into(name, move=lambda w: w):
    """A rule: the whole parameter from what `move` makes of the tensor."""

    def rule(parameters, tensor):
        parameters[name].copy_(move(tensor))

    return rule


VIEWS = {
    "whole": ((4, 6), (4, 6), lambda w: w),
    "rows": ((8, 6), (4, 6), lambda w: w[4:]),
    "columns": ((4, 12), (4, 3), lambda w: w[:, 3:6]),
    "chain of narrows": ((8, 12), (2, 3), lambda w: w.narrow(0, 2, 4).narrow(1, 6, 6)[1:3, 2:5]),
    "transposed": ((4, 6), (6, 4), lambda w: w.t()),
    "permuted": ((3, 4, 5), (5, 3, 4), lambda w: w.permute(2, 0, 1)),
    "flattened": ((3, 4, 5), (60,), lambda w: w.reshape(-1)),
    "flattened transposed rows": ((3, 4, 5), (3, 20), lambda w: w.view(3, 20)),
    "split dimension": ((12, 5), (3, 4, 5), lambda w: w.view(3, 4, 5)),
    "heads swapped": ((12, 5), (4, 3, 5), lambda w: w.view(3, 4, 5).transpose(0, 1)),
    "unsqueezed": ((4, 6), (4, 1, 6), lambda w: w.unsqueeze(1)),
    "squeezed": ((4, 1, 6), (4, 6), lambda w: w.squeeze(1)),
    "one row": ((4, 6), (6,), lambda w: w[2]),
    "chunk": ((4, 6), (4, 3), lambda w: w.chunk(2, dim=1)[1]),
    "unbound": ((4, 6), (6,), lambda w: w.unbind(0)[3]),
    "every second row": ((8, 6), (4, 6), lambda w: w[::2]),
    "every second column": ((4, 8), (4, 4), lambda w: w[:, 1::2]),
    "flat range across rows": ((4, 6), (13,), lambda w: w.view(-1)[4:17]),
    "flat range in other rows": ((4, 6), (3, 5), lambda w: w.view(-1)[4:19].view(3, 5)),
    "diagonal": ((5, 5), (5,), lambda w: w.diagonal()),
    "unfolded": ((8,), (3, 4), lambda w: w.unfold(0, 4, 2)),
    "expanded": ((6,), (4, 6), lambda w: w.expand(4, 6)),
    "one element to all": ((1,), (4,), lambda w: w),
    "scalar": ((), (), lambda w: w),
    "scalar into one": ((), (1,), lambda w: w),
    "detached": ((4, 6), (4, 6), lambda w: w.data.detach()),
}


def set_row(zeros, tensor):
    zeros[1] = tensor[2]
    return zeros


MOVES = {
    "clone": ((4, 6), (6, 4), lambda w: w.t().clone()),
    "contiguous": ((4, 6), (24,), lambda w: w.t().contiguous().view(-1)),
    "reshape that copies": ((4, 6), (24,), lambda w: w.t().reshape(-1)),
    "cat": ((4, 6), (4, 6), lambda w: torch.cat([w[2:], w[:2]])),
    "cat of columns": ((4, 6), (4, 6), lambda w: torch.cat([w[:, 4:], w[:, :4]], dim=-1)),
    "stack": ((4, 6), (6, 4), lambda w: torch.stack([w[0], w[2], w[1], w[3]], dim=1)),
    "flip": ((4, 6), (4, 6), lambda w: w.flip(0)),
    "flip both": ((4, 6), (4, 6), lambda w: w.flip(0, 1)),
    "repeat": ((2, 3), (4, 9), lambda w: w.repeat(2, 3)),
    "repeat with a new dimension": ((3,), (2, 3), lambda w: w.repeat(2, 1)),
    "repeat_interleave": ((2, 3), (4, 3), lambda w: w.repeat_interleave(2, dim=0)),
    "pad": ((4, 6), (6, 6), lambda w: torch.nn.functional.pad(w, (0, 0, 0, 2))),
    "pad inside": ((4, 6), (5, 9), lambda w: torch.nn.functional.pad(w, (1, 2, 1, 0))),
    "index_select": ((6, 4), (3, 4), lambda w: w.index_select(0, torch.tensor([4, 5, 1]))),
    "index": ((6, 4), (3, 4), lambda w: w[torch.tensor([0, -1, 2])]),
    "index of columns": ((4, 6), (4, 3), lambda w: w[:, torch.tensor([5, 0, 1])]),
    "mask": (
        (4, 6),
        (2, 6),
        lambda w: w[torch.tensor([True, False, False, True])],
    ),
    "dtype and back": ((4, 6), (4, 6), lambda w: w.to(torch.float64).to(torch.float32)),
    "device": ((4, 6), (4, 6), lambda w: w.to("cpu")),
    "zeros of its form": ((4, 6), (4, 6), lambda w: set_row(torch.zeros_like(w), w)),
    "memory of its form": ((4, 6), (4, 6), lambda w: torch.empty_like(w).copy_(w)),
    "roll by cat": ((6,), (6,), lambda w: torch.cat((w[-1:], w[:-1]))),
    "interleaved halves": (
        (8, 3),
        (8, 3),
        lambda w: torch.stack(w.chunk(2), dim=1).reshape(8, 3),
    ),
}

COMPUTED = {
    "scaled": ((4, 6), (4, 6), lambda w: w * 2),
    "minus one": ((6,), (6,), lambda w: w - 1),
    "summed rows": ((4, 6), (6,), lambda w: w.sum(0)),
    "partly scaled": ((4, 6), (4, 6), lambda w: torch.cat([w[:2], w[2:] / 2])),
    "rounded twice": ((4, 6), (4, 6), lambda w: w.to(torch.bfloat16).to(torch.float32) + 0),
    "rounded on the way": ((4, 6), (4, 6), lambda w: w.to(torch.bfloat16)),
    "looks inside": ((4, 6), (4, 6), lambda w: w if w[0, 0].item() == 1 else w.flip(0)),
    "a list of indices, which torch keeps to itself": ((6, 4), (2, 4), lambda w: w[[5, 0]]),
    "numpy": ((4, 6), (4, 6), lambda w: torch.from_numpy(w.numpy().copy())),
    "if": ((4, 6), (4, 6), lambda w: w if (w > 0).all() else -w),
}


@pytest.mark.parametrize("case", VIEWS)
def test_any_chain_of_views_is_tiles(execute, case):
    shape, target, move = VIEWS[case]
    catalog = specs(w=shape)
    engine = Engine({"p": torch.full(target, -1.0)}, w=into("p", move))
    captured = check(execute, engine, catalog)
    assert ways(captured) == {"w": "direct"}
    assert not captured.after_commit


@pytest.mark.parametrize("case", MOVES)
def test_what_only_moves_elements_is_followed(execute, case):
    shape, target, move = MOVES[case]
    catalog = specs(w=shape)
    engine = Engine({"p": torch.full(target, -1.0)}, w=into("p", move))
    assert ways(check(execute, engine, catalog)) == {"w": "followed"}


@pytest.mark.parametrize("case", COMPUTED)
def test_what_computes_goes_by_fallback_and_nothing_else_does(execute, case):
    shape, target, move = COMPUTED[case]
    catalog = specs(a=(4, 6), w=shape, z=(3, 3))
    engine = Engine(
        {"p": torch.full(target, -1.0), "a": torch.zeros(4, 6), "z": torch.zeros(3, 3)},
        a=into("a"),
        w=into("p", move),
        z=into("z"),
    )
    captured = check(execute, engine, catalog)
    assert ways(captured) == {"a": "direct", "w": "fallback", "z": "direct"}
    assert captured.report.of("fallback")[0].reason
    names = [p.name for p in captured.layout.parameters]
    assert names == ["a", "fallback:w", *(["p"] if case == "partly scaled" else []), "z"]
    assert "1 fallback" in captured.report.to_text()


def test_many_tensors_that_are_looked_into_do_not_need_a_run_each(execute):
    """As scales are, that a loader turns into numbers."""
    runs = []
    catalog = specs(**{f"layers.{i}.{n}": (1,) for n in ("scale", "bias") for i in range(20)})
    engine = Engine({"scale": torch.zeros(20), "bias": torch.zeros(20)})

    def load(weights):
        runs.append(1)
        for name, tensor in weights:
            _, index, kind = name.split(".")
            value = tensor.item() if kind == "scale" else tensor[0]
            engine.parameters[kind][int(index)] = value

    engine.load_weights = load
    captured = check(execute, engine, catalog)
    assert captured.report.counts == {"direct": 20, "followed": 0, "fallback": 20, "unused": 0}
    assert len(runs) < 10
    reasons = [way.reason for way in captured.report.of("fallback")]
    assert "of its like, layers.4.scale" in reasons[-1]


def test_what_is_unmanaged_stays_so_beside_tensors_that_are_looked_into(execute):
    engine = Engine(
        {"p": torch.ones(4, 6), "q": torch.ones(2)},
        a=into("p", lambda w: w if w[0, 0].item() > 0 else -w),
    )
    captured = check(execute, engine, specs(a=(4, 6)), unmanaged=["q"])
    assert captured.report.unmanaged["q"] == "declared unmanaged"


def test_a_parameter_that_is_partly_computed_keeps_its_other_tiles(execute):
    catalog = specs(q=(4, 6), k=(2, 6))
    engine = Engine(
        {"qkv": torch.zeros(6, 6)},
        q=lambda p, w: p["qkv"][:4].copy_(w),
        k=lambda p, w: p["qkv"][4:].copy_(w * 3),
    )
    captured = check(execute, engine, catalog)
    assert ways(captured) == {"q": "direct", "k": "fallback"}


def test_arithmetic_in_place_on_a_parameter_is_seen(execute):
    catalog = specs(q=(4, 6), k=(4, 6))

    def scaled(p, w):
        p["q"].copy_(w)
        p["q"].mul_(2)

    engine = Engine({"q": torch.zeros(4, 6), "k": torch.zeros(4, 6)}, q=scaled, k=into("k"))
    assert ways(check(execute, engine, catalog)) == {"q": "fallback", "k": "direct"}


def test_two_tensors_of_one_sum_go_by_fallback_together(execute):
    catalog = specs(base=(4, 6), delta=(4, 6))
    engine = Engine(
        {"p": torch.zeros(4, 6)},
        base=into("p"),
        delta=lambda p, w: p["p"].add_(w),
    )
    assert ways(check(execute, engine, catalog)) == {"base": "fallback", "delta": "fallback"}


def test_memory_of_the_loader_itself_is_followed(execute):
    """Experts that are collected into one tensor, which is then copied as a whole."""
    catalog = specs(**{f"e{i}": (4, 6) for i in range(3)})
    stack = {}

    def collect(index):
        def rule(p, w):
            if index == 0:
                stack["of"] = torch.empty(3, 6, 4, dtype=w.dtype, device=w.device)
            stack["of"][index] = w.t()
            if index == 2:
                p["p"].copy_(stack["of"])

        return rule

    engine = Engine({"p": torch.zeros(3, 6, 4)}, **{f"e{i}": collect(i) for i in range(3)})
    assert set(ways(check(execute, engine, catalog)).values()) == {"followed"}


def test_memory_of_the_loader_on_the_engines_device_is_followed(execute):
    catalog = specs(w=(4, 6))

    def rule(p, w):
        padded = torch.zeros(6, 6)
        padded[1:5] = w
        p["p"].data[...] = padded

    captured = check(execute, Engine({"p": torch.full((6, 6), -1.0)}, w=rule), catalog)
    assert ways(captured) == {"w": "followed"}
    assert len(captured.layout.fills) == 2


def test_padding_that_is_zeroed_becomes_a_fill(execute):
    catalog = specs(w=(5, 6))

    def rule(p, w):
        p["p"][:5].data.copy_(w)
        p["p"][5:].data.fill_(0)

    captured = check(execute, Engine({"p": torch.full((8, 6), -1.0)}, w=rule), catalog)
    (fill,) = captured.layout.fills
    assert (fill.element_offset, fill.length) == (30, (3, 6))


def test_zeros_first_and_weights_on_top(execute):
    catalog = specs(w=(5, 4))

    def rule(p, w):
        p["p"].zero_()
        p["p"][1:6, 1:5] = w

    check(execute, Engine({"p": torch.full((8, 6), -1.0)}, w=rule), catalog)


def test_views_of_parameters_of_any_kind_are_places(execute):
    catalog = specs(a=(6, 4), b=(3, 8), c=(6, 2))

    def rows_apart(p, w):
        p["p"].view(3, 2, 8)[:, 1].copy_(w)

    engine = Engine(
        {"p": torch.zeros(6, 8), "q": torch.zeros(4, 6), "r": torch.zeros(3, 4)},
        a=lambda p, w: p["q"].t().copy_(w),
        b=lambda p, w: (rows_apart(p, w), p["p"].view(3, 16)[:, :8].copy_(w)),
        c=lambda p, w: p["r"].view(-1).copy_(w.reshape(-1)),
    )
    assert set(ways(check(execute, engine, catalog)).values()) == {"direct"}


def test_parameters_with_strides_of_their_own_are_their_storage(execute):
    catalog = specs(a=(6, 4), b=(4, 3))
    fused = torch.zeros(4, 6)
    parameters = {"transposed": torch.zeros(4, 6).t(), "left": fused[:, :3], "right": fused[:, 3:]}
    engine = Engine(
        {}, a=into("transposed"), b=lambda p, w: (into("left")(p, w), into("right")(p, w))
    )
    engine.parameters = parameters
    captured = check(execute, engine, catalog)
    assert [(p.name, p.element_count) for p in captured.layout.parameters] == [
        ("left", 24),
        ("transposed", 24),
    ]


def test_tied_parameters_are_one(execute):
    catalog = specs(embed=(10, 4))
    engine = Engine({}, embed=into("embed"))
    shared = torch.zeros(10, 4)
    engine.parameters = {
        "embed": shared,
        "lm_head": torch.nn.Parameter(shared, requires_grad=False),
    }
    captured = check(execute, engine, catalog)
    assert [p.name for p in captured.layout.parameters] == ["embed"]
    assert captured.parameters["embed"].data_ptr() == shared.data_ptr()


def test_parameters_of_one_allocation_are_told_apart(execute):
    catalog = specs(a=(4, 6), b=(3, 3))
    flat = torch.zeros(40)
    engine = Engine({}, a=into("a"), b=into("b"))
    engine.parameters = {"a": flat[:24].view(4, 6), "b": flat[24:33].view(3, 3)}
    assert len(check(execute, engine, catalog).layout.parameters) == 2


@pytest.mark.parametrize(
    ("catalog_dtype", "parameter_dtype", "through", "way"),
    [
        (Dtype.F32, torch.bfloat16, None, "direct"),
        (Dtype.F32, torch.bfloat16, torch.bfloat16, "followed"),
        (Dtype.F32, torch.float16, torch.float64, "followed"),
        (Dtype.BF16, torch.bfloat16, torch.float32, "followed"),
        (Dtype.F32, torch.bfloat16, torch.float16, "fallback"),
        (Dtype.F32, torch.float32, torch.bfloat16, "fallback"),
        (Dtype.I32, torch.float32, None, "fallback"),
    ],
)
def test_a_cast_is_followed_if_it_is_the_one_of_the_pair(
    execute, catalog_dtype, parameter_dtype, through, way
):
    catalog = [TensorSpec("w", catalog_dtype, (4, 6))]

    def rule(p, w):
        p["p"].copy_(w if through is None else w.to(through))

    engine = Engine({"p": torch.zeros(4, 6, dtype=parameter_dtype)}, w=rule)
    assert ways(check(execute, engine, catalog)) == {"w": way}


def test_bytes_that_are_moved_as_another_type_of_their_size(execute):
    catalog = [TensorSpec("w", Dtype.BF16, (4, 6))]

    def rule(p, w):
        p["p"].view(torch.int16).copy_(w.view(torch.int16))

    engine = Engine({"p": torch.zeros(4, 6, dtype=torch.bfloat16)}, w=rule)
    assert ways(check(execute, engine, catalog)) == {"w": "followed"}


def test_what_goes_to_memory_that_is_no_parameter_goes_by_fallback(execute):
    catalog = specs(w=(4, 6), bias=(6,))
    buffer = torch.full((6,), -1.0)
    engine = Engine({"p": torch.zeros(4, 6)}, w=into("p"), bias=lambda p, w: buffer.copy_(w))
    captured = transfuse.capture(engine.load_weights, engine.parameters, catalog)
    assert torch.equal(buffer, torch.full((6,), -1.0))
    assert ways(captured) == {"w": "direct", "bias": "fallback"}
    captured.parameters["fallback:bias"].copy_(torch.arange(6.0))
    for hook in captured.after_commit.values():
        hook()
    assert torch.equal(buffer, torch.arange(6.0))


def test_the_engines_other_tensors_hold_what_they_held(execute):
    counter = torch.zeros(3)

    def rule(p, w):
        counter.add_(1)
        p["p"].copy_(w)

    engine = Engine({"p": torch.zeros(4, 6)}, w=rule)
    transfuse.capture(engine.load_weights, engine.parameters, specs(w=(4, 6)))
    assert torch.equal(counter, torch.zeros(3))


def random_move(chance, tensor):
    """A random step of views and moves."""
    choice, d = chance.randrange(9), chance.randrange(tensor.dim())
    n = tensor.shape[d]
    if choice == 0:
        begin = chance.randrange(n)
        return tensor.narrow(d, begin, chance.randint(1, n - begin))
    if choice == 1:
        return tensor.transpose(d, chance.randrange(tensor.dim()))
    if choice == 2:
        return tensor.reshape(-1).unsqueeze(chance.randrange(2))
    if choice == 3:
        divisors = [k for k in range(1, n + 1) if n % k == 0]
        return tensor.unflatten(d, (chance.choice(divisors), -1)) if tensor.dim() < 4 else tensor
    if choice == 4:
        return tensor.flip(d)
    if choice == 5:
        return torch.cat([tensor.narrow(d, n // 2, n - n // 2), tensor.narrow(d, 0, n // 2)], d)
    if choice == 6:
        return tensor.contiguous()
    if choice == 7:
        indices = torch.tensor([chance.randrange(n) for _ in range(chance.randint(1, n))])
        return tensor.index_select(d, indices)
    return tensor[(slice(None),) * d + (slice(chance.randrange(n), None, chance.randint(1, 3)),)]


@pytest.mark.parametrize("seed", range(120))
def test_random_chains_of_moves_end_where_the_loader_puts_them(execute, seed):
    """Views of the source, then of the parameter, around a copy."""
    catalog = specs(w=(4, 6, 5), v=(7, 8))

    def chain(tensor, index):
        chance = random.Random(1000 * seed + index)
        for _ in range(chance.randint(1, 5)):
            tensor = random_move(chance, tensor)
        return tensor

    shapes = {
        spec.name: chain(torch.empty(spec.shape), index).shape for index, spec in enumerate(catalog)
    }
    backwards = random.Random(seed).random() < 0.5

    def place(parameter):
        return parameter.permute(*reversed(range(parameter.dim()))) if backwards else parameter

    engine = Engine(
        {
            name: torch.full(tuple(reversed(shape)) if backwards else tuple(shape), -1.0)
            for name, shape in shapes.items()
        },
        w=lambda p, t: place(p["w"]).copy_(chain(t, 0)),
        v=lambda p, t: place(p["v"]).copy_(chain(t, 1)),
    )
    assert "fallback" not in ways(check(execute, engine, catalog)).values()


# Loaders and arguments that are wrong


def refused(engine, catalog, message, error=LayoutMismatchError, **options):
    before = {name: value.clone() for name, value in engine.parameters.items()}
    places = {name: value.data_ptr() for name, value in engine.parameters.items()}
    with pytest.raises(error, match=message):
        transfuse.capture(engine.load_weights, engine.parameters, catalog, **options)
    for name, value in engine.parameters.items():
        assert torch.equal(value, before[name])
        assert value.data_ptr() == places[name]


def two(**rules):
    return Engine({"p": torch.ones(4, 6), "q": torch.ones(4, 6)}, **rules)


def test_a_loader_that_fails_half_way_is_named_with_the_tensor_it_had():
    def fails(p, w):
        p["q"][:2].copy_(w[:2])
        raise ZeroDivisionError("half-way")

    engine = two(a=into("p"), b=fails)
    refused(engine, specs(a=(4, 6), b=(4, 6)), "failed at b.*ZeroDivisionError: half-way")


def test_a_tensor_that_the_loader_does_not_know_is_named():
    engine = two(a=into("p"))
    refused(engine, specs(a=(4, 6), stranger=(2,)), "failed at stranger.*KeyError")


def test_a_place_that_is_written_from_two_tensors_is_named():
    engine = two(a=into("p"), b=lambda p, w: (p["p"][1:3].copy_(w[:2]), p["q"].copy_(w)))
    refused(engine, specs(a=(4, 6), b=(4, 6)), r"^p: .*written from a and from b")


def test_the_same_written_twice_changes_nothing(execute):
    engine = Engine({"p": torch.zeros(4, 6)}, a=lambda p, w: (into("p")(p, w), into("p")(p, w)))
    check(execute, engine, specs(a=(4, 6)))


def test_a_view_beyond_the_source_is_refused():
    def outside(p, w):
        p["p"].copy_(w.as_strided((4, 6), (6, 1), 12))

    engine = Engine({"p": torch.zeros(4, 6)}, a=outside)
    refused(engine, specs(a=(4, 6)), "at a")
    engine = Engine({"p": torch.zeros(4, 6)}, a=lambda p, w: p["p"].copy_(w[:, 4:9]))
    refused(engine, specs(a=(4, 6)), "failed at a.*RuntimeError")


def test_a_write_beyond_a_parameter_is_refused():
    flat = torch.zeros(100)
    engine = Engine({}, a=lambda p, w: p["p"].as_strided((4, 6), (6, 1), 12).copy_(w))
    engine.parameters = {"p": flat[:24].view(4, 6)}
    refused(engine, specs(a=(4, 6)), r"^load_weights, at a: p: expected an access within \(4, 6\)")


def test_what_is_left_unwritten_is_named_unless_it_is_declared(execute):
    catalog = specs(a=(4, 6))
    refused(two(a=into("p")), catalog, r"^q: expected the loader to write all of \(4, 6\), found")
    captured = check(execute, two(a=into("p")), catalog, unmanaged=["q"])
    assert dict(captured.report.unmanaged) == {"q": "declared unmanaged"}
    assert [p.name for p in captured.layout.parameters] == ["p"]
    partly = two(a=lambda p, w: (p["p"][:, :5].copy_(w[:, :5]), p["q"].copy_(w)))
    refused(partly, catalog, r"^p: .*unwritten", unmanaged=["p"])


def test_a_constant_is_left_to_the_engine_if_it_is_a_whole_parameter(execute):
    catalog = specs(a=(4, 6))
    engine = two(a=lambda p, w: (p["p"].copy_(w), p["q"].fill_(1.0)))
    assert "constant 1.0" in check(execute, engine, catalog).report.unmanaged["q"]
    engine = two(a=lambda p, w: (p["p"].copy_(w), p["q"].copy_(w), p["q"][0].fill_(3.0)))
    refused(engine, catalog, "^q: expected catalog tensors or zeros, found the constant 3.0")


def test_tensors_that_are_not_used_are_reported_or_refused(execute):
    catalog = specs(a=(4, 6), ignored=(3,), never=(2,))

    def load(weights):
        for name, tensor in weights:
            if name == "a":
                engine.parameters["p"].copy_(tensor)
                engine.parameters["q"].copy_(tensor)
            if name == "ignored":
                return

    engine = two()
    engine.load_weights = load
    captured = check(execute, engine, catalog)
    assert ways(captured) == {"a": "direct", "ignored": "unused", "never": "unused"}
    assert "unused never: the loader never asked for it" in captured.report.to_text()
    refused(engine, catalog, "found 2 unused: ignored, never", require_all=True)


def test_a_loader_that_gives_a_parameter_other_memory_is_refused():
    def rebind(p, w):
        p["p"].data = torch.zeros(4, 6)

    engine = Engine({"p": torch.ones(4, 6)}, a=rebind)
    engine.parameters = {"p": torch.nn.Parameter(torch.ones(4, 6))}
    refused(engine, specs(a=(4, 6)), "gives a parameter other memory.*p: moved")


def test_a_loader_that_replaces_a_parameter_of_a_module_is_refused_and_undone():
    module = torch.nn.Linear(6, 4)
    weight, place = module.weight, module.weight.data_ptr()

    def load(weights):
        module.weight = torch.nn.Parameter(dict(weights)["weight"])

    with pytest.raises(LayoutMismatchError, match="gives a parameter other memory.*weight: moved"):
        transfuse.capture(load, module, specs(weight=(4, 6)), unmanaged=["bias"])
    assert module.weight is weight
    assert module.weight.data_ptr() == place


def test_a_loader_that_hides_its_failure_is_still_refused():
    def hides(p, w):
        p["p"].copy_(w)
        try:
            p["q"].copy_(w.as_strided((4, 6), (6, 1), 12))
        except Exception:  # noqa: BLE001
            p["q"].copy_(w)

    flat = torch.zeros(100)
    engine = two(a=hides)
    engine.parameters["q"] = flat[:24].view(4, 6)

    def beyond(p, w):
        p["p"].copy_(w)
        try:
            p["q"].as_strided((4, 6), (6, 1), 12).copy_(w)
        except Exception:  # noqa: BLE001
            p["q"].copy_(w)

    engine.rules["a"] = beyond
    refused(engine, specs(a=(4, 6)), "expected an access within")


@pytest.mark.parametrize(
    ("parameters", "catalog", "options", "message"),
    [
        ({}, specs(a=(2,)), {}, "0 parameters"),
        ({"p": torch.zeros(2)}, [], {}, "0 catalog tensors"),
        ({"p": 3}, specs(a=(2,)), {}, "p: expected a torch tensor, found int"),
        ({"p": torch.zeros(2)}, ["a"], {}, "expected TensorSpec, found str"),
        ({"p": torch.zeros(2)}, specs(a=(2,)) * 2, {}, "a is listed twice"),
        ({"p": torch.zeros(2)}, {"a": 5}, {}, "a: expected a tensor or a TensorSpec"),
        ({"p": torch.zeros(2)}, specs(a=(2,)), {"unmanaged": ["x*"]}, r"'x\*' is the name of no"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(parameters, catalog, options, message):
    with pytest.raises(transfuse.InvalidArgumentError, match=message):
        transfuse.capture(lambda weights: list(weights), parameters, catalog, **options)


def test_a_config_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(transfuse.NotFoundError, match="config.json"):
        transfuse.capture(list, {"p": torch.zeros(2)}, tmp_path / "config.json")


def test_a_fallback_that_does_not_do_its_part_is_an_error():
    lazy = {"now": False}

    def load(weights):
        for name, tensor in weights:
            if name == "a" or not lazy["now"]:
                engine.parameters[{"a": "p", "b": "q"}[name]].copy_(tensor * 2)

    engine = two()
    captured = transfuse.capture(load, engine.parameters, specs(a=(4, 6), b=(4, 6)))
    (hook,) = captured.after_commit.values()
    hook()
    lazy["now"] = True
    with pytest.raises(
        LayoutMismatchError, match="^q: expected load_weights to write what is left to it from a, b"
    ):
        hook()


def test_parameters_without_memory_have_a_layout_all_the_same():
    engine = Engine({"p": torch.zeros(4, 6, device="meta")}, a=into("p"), b=into("p"))
    captured = transfuse.capture(engine.load_weights, engine.parameters, specs(a=(4, 6)))
    assert len(captured.layout.tiles) == 1


def test_a_loader_that_needs_tensors_together_gets_them_together(execute):
    """One of three experts is scaled; they are collected first, and written as one stack."""
    catalog = specs(e0=(4, 6), e1=(4, 6), e2=(4, 6), other=(3,))

    def load(weights):
        given = dict(weights)
        if "other" in given:
            engine.parameters["other"].copy_(given["other"])
        if "e1" in given:
            stack = [given["e0"], given["e1"] * 2, given["e2"]]
            engine.parameters["p"].copy_(torch.stack(stack))

    engine = Engine({"p": torch.zeros(3, 4, 6), "other": torch.zeros(3)})
    engine.load_weights = load
    captured = check(execute, engine, catalog)
    assert ways(captured) == {n: "fallback" for n in ("e0", "e1", "e2")} | {"other": "direct"}
    reasons = {way.name: way.reason for way in captured.report.of("fallback")}
    assert "KeyError" in reasons["e0"]


def test_a_loader_that_would_write_over_others_gets_those_too(execute):
    """What was not given is zeros in its stack: alone it would wipe out what tiles bring."""
    catalog = specs(e0=(4, 6), e1=(4, 6), e2=(4, 6))

    def load(weights):
        stack = torch.zeros(3, 4, 6)
        for name, tensor in weights:
            stack[int(name[1])] = tensor * 2 if name == "e1" else tensor
        engine.parameters["p"].copy_(stack)

    engine = Engine({"p": torch.zeros(3, 4, 6)})
    engine.load_weights = load
    captured = check(execute, engine, catalog)
    assert set(ways(captured).values()) == {"fallback"}
    assert "written over e0" in captured.report.to_text()


def test_a_fallback_that_writes_over_other_tensors_is_an_error():
    state = {"wild": False}

    def load(weights):
        for name, tensor in weights:
            engine.parameters["q" if name == "b" else "p"].copy_(
                tensor * 2 if name == "b" else tensor
            )
            if state["wild"]:
                engine.parameters["p"][1:2].zero_()

    engine = two()
    captured = transfuse.capture(load, engine.parameters, specs(a=(4, 6), b=(4, 6)))
    assert ways(captured) == {"a": "direct", "b": "fallback"}
    state["wild"] = True
    with pytest.raises(LayoutMismatchError, match="^p: .*which holds other tensors"):
        captured.load_fallback()


@pytest.mark.parametrize("seed", range(80))
def test_random_programs_over_memory_of_the_loader(execute, seed):
    """Copies between regions of tensors, scratch and themselves, zeros, and arithmetic at times."""
    catalog = specs(a=(5, 6), b=(6, 5))
    computes = seed % 4 == 0

    def region(chance, tensor, shape=None):
        if shape is None:
            shape = [chance.randint(1, n) for n in tensor.shape]
        begins = [chance.randrange(n - m + 1) for n, m in zip(tensor.shape, shape, strict=True)]
        for d, (begin, count) in enumerate(zip(begins, shape, strict=True)):
            tensor = tensor.narrow(d, begin, count)
        return tensor

    def load(weights):
        chance = random.Random(seed)
        given = dict(weights)
        scratch = {"s": given["a"].new_zeros(5, 6), "t": torch.zeros(6, 5), "u": torch.zeros(30)}
        places = {**scratch, "u": scratch["u"].view(5, 6)}
        for _ in range(12):
            target = places[chance.choice("stu")]
            if chance.random() < 0.5:
                target = target.t()
            if chance.random() < 0.15:
                region(chance, target).zero_()
                continue
            scaled = computes and chance.random() < 0.2
            held = [] if scaled else places.values()
            source = chance.choice([given["a"], given["b"], *held])
            shape = [min(n, m) for n, m in zip(target.shape, source.shape, strict=True)]
            shape = [chance.randint(1, n) for n in shape]
            taken = region(chance, source, shape)
            region(chance, target, shape).copy_(taken * 2 if scaled else taken.clone())
        for name, parameter in engine.parameters.items():
            parameter.copy_(scratch[name])

    engine = Engine(
        {"s": torch.ones(5, 6), "t": torch.ones(6, 5), "u": torch.ones(30)},
    )
    engine.load_weights = load
    captured = check(execute, engine, catalog)
    assert computes or "fallback" not in ways(captured).values(), captured.report.to_text()
