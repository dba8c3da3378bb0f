"""Layouts of Megatron-Core specs against Megatron-Core itself: the modules that its own classes
build on every rank, and a model that computes what the checkpoint's does. Skipped where the package
is not installed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transfuse

# Not megatron.core, whose imports take seconds: only the worker needs them.
pytest.importorskip("megatron", reason="megatron-core is not installed")
transformers = pytest.importorskip("transformers")

CLASSES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "mixtral": "Mixtral",
    "glm4_moe": "Glm4Moe",
    "deepseek_v3": "DeepseekV3",
}
# A dense layer, then experts of which one is shared.
ROUTED = {
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
EXPERTS = {
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 8},
    "mixtral": {"num_local_experts": 6},
    "glm4_moe": {
        **ROUTED,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
    "deepseek_v3": {
        **ROUTED,
        "q_lora_rank": 12,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 3,
    },
}


def model_config(model_type, *, layers=4, groups=2, tied=False, hidden=8):
    config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": groups,
        "head_dim": hidden // 8 * 2 if model_type in ("qwen3", "glm4_moe") else max(hidden // 8, 1),
        "vocab_size": 67,
        "tie_word_embeddings": tied,
    }
    if model_type == "deepseek_v3":
        config |= {"num_key_value_heads": 8, "head_dim": 2}
    return config | EXPERTS.get(model_type, {})


def expert_count(model):
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((model[name] for name in names if name in model), 0)


NOT_OPTIONS = ("stages", "expert_bias", "order")  # of a spec, but of Megatron's own config


def spec_of(world):
    options = [key if value is True else f"{key}={value}" for key, value in world.items()]
    options = [option for option in options if option.partition("=")[0] not in NOT_OPTIONS]
    return "megatron:" + ",".join(options) if options else "megatron"


def layouts_of(model, world):
    """The names of Megatron's modules without TransformerEngine, which needs a GPU."""
    styles = {"norms": "separate", "experts": "sequential", "dtype": "f32"}
    spec = transfuse.parse_parallel_spec(spec_of(styles | world))
    return transfuse.make_layouts(transfuse.parse_model_config(json.dumps(model)), spec)


class Worker:
    """One process for all tests: the imports of Megatron-Core take seconds."""

    def __init__(self, log):
        self._log = log
        self._process = None

    def ask(self, *requests):
        """What it answers to each of the requests."""
        if self._process is None:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("megatron_worker.py"))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=dict(os.environ, OMP_NUM_THREADS="1"),
                    text=True,
                )
        self._process.stdin.write(json.dumps(requests) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("FACTS "):
                return json.loads(line.removeprefix("FACTS "))
        self.stop()
        return pytest.fail(f"the worker ended:\n{self._log.read_text()[-4000:]}")

    def stop(self):
        """Ends the process; another one starts with the next request."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """ask(*requests): what the worker answers to each."""
    worker = Worker(tmp_path_factory.mktemp("megatron") / "worker.log")
    yield worker.ask
    worker.stop()


def first_tile(layout, parameter):
    wanted = layout.find_parameter(parameter)
    return next(t for t in layout.tiles if t.parameter == wanted)


def expect_place(layout, parameter, rank):
    """A row-parallel weight begins at the columns of its rank."""
    tile = first_tile(layout, parameter)
    assert tile.box.offset[1] == rank * tile.box.length[1], parameter


WORLDS = [
    (model_config("llama"), {}),
    (model_config("llama", tied=True), {"tp": 2, "pp": 2}),
    (model_config("qwen2"), {"tp": 2, "pp": 2, "vpp": 2}),
    (model_config("qwen2", groups=4), {"tp": 8, "cp": 2}),
    (model_config("qwen3", groups=4), {"tp": 8}),
    (model_config("qwen3", layers=7, tied=True), {"pp": 3, "first": 2, "last": 1}),
    (model_config("qwen3", layers=10), {"pp": 3, "vpp": 2, "first": 2, "last": 4}),
    (model_config("qwen3_moe"), {"tp": 2, "ep": 3}),
    (model_config("qwen3_moe"), {"tp": 2, "ep": 2, "etp": 1}),
    (model_config("qwen3_moe"), {"tp": 2, "pp": 2, "ep": 3, "etp": 4}),
    (model_config("qwen3_moe", tied=True), {"pp": 2, "vpp": 2, "ep": 2, "etp": 2}),
    (model_config("qwen3", layers=7), {"pp": 2, "account_for_embedding": True}),
    (
        model_config("qwen3", layers=6, tied=True),
        {"pp": 2, "vpp": 2, "account_for_embedding": True, "account_for_loss": True},
    ),
    (
        model_config("qwen3_moe", layers=7),
        {"pp": 3, "layers": "0/4/3", "stages": "E|tttt|tttL", "tp": 2},
    ),
    (
        model_config("qwen3", layers=7),
        {"pp": 2, "vpp": 2, "layers": "1/2/3/1", "stages": "Et|tt|ttt|tL"},
    ),
    (model_config("llama"), {"padded_vocab": 96}),
    (model_config("llama"), {"tp": 2, "padded_vocab": 70}),
    (model_config("mixtral"), {"tp": 2, "ep": 3}),
    (model_config("mixtral"), {"tp": 2, "pp": 2, "ep": 2, "etp": 1}),
    (model_config("glm4_moe"), {"tp": 2, "ep": 3}),
    (model_config("glm4_moe"), {"pp": 2, "ep": 2, "etp": 2}),
    (model_config("deepseek_v3"), {}),
    (model_config("deepseek_v3"), {"tp": 2, "ep": 3}),
    (model_config("deepseek_v3"), {"tp": 2, "pp": 2, "ep": 2, "etp": 1}),
]


@pytest.mark.parametrize("index", range(len(WORLDS)), ids=[spec_of(world) for _, world in WORLDS])
def test_every_rank_has_the_parameters_that_megatron_builds(ask, index):
    model, world = WORLDS[index]
    layouts = layouts_of(model, world)
    request = {"model": model, "world": world, "size": len(layouts), "spec": spec_of(world)}
    [facts] = ask(request)
    for layout, fact in zip(layouts, facts, strict=True):
        assert fact["live"] == [layout.encode().hex()] * 3
        sizes = {p.name: p.element_count for p in layout.parameters}
        assert sizes == {name: math.prod(shape) for name, shape in fact["shapes"].items()}
        for prefix, number in fact["layers"].items():
            for parameter in layout.parameters:
                if parameter.name.startswith(prefix):
                    tile = first_tile(layout, parameter.name)
                    name = layout.tensors[tile.tensor].name
                    assert name.startswith(f"model.layers.{number}."), parameter.name
            ranks = fact["ranks"]
            expect_place(layout, prefix + "self_attention.linear_proj.weight", ranks["tp"])
            router = layout.find_parameter(prefix + "mlp.router.weight")
            if router is None:
                continue
            expert = prefix + "mlp.experts.local_experts.0.linear_fc2.weight"
            expect_place(layout, expert, ranks["etp"])
            name = layout.tensors[first_tile(layout, expert).tensor].name
            first = ranks["ep"] * expert_count(model) // world.get("ep", 1)
            assert f".experts.{first}." in name


def test_I7_ranks_come_from_the_groups_and_not_from_the_world_rank(ask):
    model, world = model_config("qwen3"), {"tp": 2, "pp": 2, "dp": 2}
    ordered = layouts_of(model, world)
    groups = {**world, "order": "tp-cp-ep-pp-dp"}  # pipeline stages before replicas
    [facts] = ask({"model": model, "world": groups, "size": 8, "spec": spec_of(world)})
    stages = [fact["ranks"]["pp"] for fact in facts]
    assert stages == [0, 0, 1, 1, 0, 0, 1, 1]
    for rank, fact in enumerate(facts):
        tp, pp = fact["ranks"]["tp"], fact["ranks"]["pp"]
        assert fact["live"] == [ordered[4 * pp + tp].encode().hex()] * 3
        assert (fact["live"][0] == ordered[rank].encode().hex()) == (rank in (0, 1, 6, 7))


DENSE_CHANGES = [
    ({}, ""),
    (
        {"parameter": "decoder.layers.1.mlp.linear_fc1.weight", "shape": [32, 8]},
        "LayoutMismatchError: qwen2 under megatron:tp=2,pp=2,vpp=1,ep=1, rank tp 1 pp 1 etp 1 ep 0:"
        " the module does not agree in 1 point: decoder.layers.1.mlp.linear_fc1.weight: expected "
        "[16, 8], found [32, 8]",
    ),
    (
        {"parameter": "decoder.layers.0.self_attention.linear_qkv.bias", "shape": [13]},
        "decoder.layers.0.self_attention.linear_qkv.bias: expected [6], found [13]",
    ),
    (
        {"parameter": "decoder.layers.0.self_attention.linear_qkv.bias", "deleted": True},
        "decoder.layers.0.self_attention.linear_qkv.bias: missing; expected [6] of model.layers.2.",
    ),
    (
        {
            "parameter": "decoder.layers.0.mlp.linear_fc2.weight",
            "attributes": {"partition_dim": 0},
        },
        "linear_fc2.weight: expected tensor_model_parallel with partition_dim 1, found "
        "partition_dim 0",
    ),
    (
        {
            "parameter": "decoder.layers.0.mlp.linear_fc1.weight",
            "attributes": {"tensor_model_parallel": False},
        },
        "linear_fc1.weight: expected tensor_model_parallel with partition_dim 0, found a tensor "
        "that is whole on every rank",
    ),
    (
        {
            "parameter": "decoder.layers.0.mlp.linear_fc1.weight",
            "attributes": {"partition_stride": 1},
        },
        "decoder.layers.0.mlp.linear_fc1.weight: expected partition_stride 2, found 1",
    ),
    (
        {"parameter": "decoder.layers.0.mlp.linear_fc2.weight", "transposed": True},
        "UnsupportedError: decoder.layers.0.mlp.linear_fc2.weight: is torch.strided on cpu, "
        "strides (1, 8); expected a dense row-major",
    ),
    (
        {"parameter": "decoder.layers.0.mlp.linear_fc2.weight", "meta": True},
        "UnsupportedError: decoder.layers.0.mlp.linear_fc2.weight: is torch.strided on meta",
    ),
    (
        {"layer_number": 2},
        "decoder.layers.1: expected layer_number 3 of num_hidden_layers = 4, found 4",
    ),
    (
        {"spec": "megatron:tp=2,pp=2,first=1"},
        "decoder.layers.0: expected layer_number 2, found 3",
    ),
    ({"spec": "megatron:tp=2,pp=2,vpp=2"}, "expected vpp = 2, found 1"),
    ({"spec": "megatron:tp=4,pp=2"}, "self_attention.linear_proj.weight: expected [8, 2], found"),
    ({"config": {"num_hidden_layers": 5}}, "expected to end with layer_number 5"),
    (
        {"config": {"vocab_size": 257}},
        "128 rows on each of tp = 2 ranks, expected vocab_size = 257",
    ),
    ({"config": {"intermediate_size": 32}}, "mlp.linear_fc1.weight: expected [32, 8], found"),
    (
        {"config": {"model_type": "llama"}},
        "self_attention.linear_qkv.bias: extra, [6]; expected no",
    ),
]


def test_a_module_that_is_not_what_the_spec_means_is_refused_by_name(ask):
    changes = [change for change, _ in DENSE_CHANGES]
    model, world = model_config("qwen2", groups=2), {"tp": 2, "pp": 2}
    [said] = ask({"model": model, "world": world, "rank": 3, "size": 4, "changes": changes})
    for found, (change, words) in zip(said, DENSE_CHANGES, strict=True):
        if words:
            assert words in found, change
            assert "Error: " in found
        else:
            bytes.fromhex(found)


def test_a_buffer_that_the_checkpoint_lacks_is_an_error_and_a_tied_config_too(ask):
    model = model_config("qwen3_moe")
    world = {"ep": 2, "expert_bias": True}
    tied = {"config": {"tie_word_embeddings": True}}
    [[biased], [untied]] = ask(
        {"model": model, "world": world, "rank": 1, "size": 2, "changes": [{}]},
        {"model": model, "world": {}, "rank": 0, "size": 1, "changes": [tied]},
    )
    assert "LayoutMismatchError" in biased
    assert "decoder.layers.3.mlp.router.expert_bias: extra, [6]" in biased
    assert "output_layer.weight: extra, [67, 8]" in untied


def test_every_parameter_keeps_the_dtype_that_the_module_gives_it(ask):
    model = model_config("qwen3")
    halves = "decoder.layers.2.mlp.linear_fc2.weight"
    change = {"parameter": halves, "dtype": "bfloat16"}
    request = {"model": model, "world": {"tp": 2}, "rank": 0, "size": 2, "changes": [change]}
    [[said]] = ask(request)
    layout = transfuse.Layout.decode(bytes.fromhex(said))
    dtypes = {p.name: p.dtype for p in layout.parameters}
    assert dtypes.pop(halves) == transfuse.Dtype.BF16
    assert set(dtypes.values()) == {transfuse.Dtype.F32}
    assert layout.tile_bytes < layouts_of(model, {"tp": 2})[0].tile_bytes


def test_every_step_of_megatrons_own_optimizers_is_a_version(ask, job):
    model = model_config("qwen3")
    single, half = ask(
        {"model": model, "job": f"{job}-single", "half": False},
        {"model": model, "job": f"{job}-half", "half": True},
    )
    for facts in (single, half):
        # After the block a step publishes nothing.
        assert facts["versions"] == [[1, True], [2, True], [2, True]]
        assert facts["moved"] > 0.9
    assert (single["optimizer"], single["dtypes"]) == ("FP32Optimizer", ["torch.float32"])
    # Its step() first changes weights in float32, then what the model has.
    assert half["optimizer"] == "Float16OptimizerWithFloat16Params"
    assert half["dtypes"] == ["torch.bfloat16"]


@pytest.mark.parametrize("model_type", CLASSES)
def test_megatron_computes_the_logits_of_the_checkpoint_that_a_plan_put_there(
    ask, execute, tmp_path, model_type
):
    model = model_config(model_type, layers=2, hidden=32)
    torch.manual_seed(0)
    extra = {"num_experts_per_tok": 2, "norm_topk_prob": True, "rms_norm_eps": 1e-5}
    if "n_routed_experts" in model:
        extra |= {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    config = getattr(transformers, CLASSES[model_type] + "Config")(
        **model | extra, rope_theta=10000.0, max_position_embeddings=32
    )
    checkpoint = getattr(transformers, CLASSES[model_type] + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in checkpoint.parameters():
            parameter.normal_(std=0.3)
        for name, buffer in checkpoint.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    tokens = torch.arange(12)[None] * 5 % model["vocab_size"]
    with torch.no_grad():
        expected = checkpoint(tokens).logits

    [target] = layouts_of(model, {})
    source = transfuse.make_layout(
        transfuse.parse_model_config(json.dumps(model)),
        transfuse.parse_parallel_spec("hf:dtype=f32"),
        0,
    )
    held = {p.name: torch.full((p.element_count,), float("nan")) for p in target.parameters}
    plan = transfuse.compile(target, [source])
    state = {name: value.detach().flatten() for name, value in checkpoint.state_dict().items()}
    execute(plan, [(source, state)], held)
    torch.save({"weights": held, "tokens": tokens}, tmp_path / "in.pt")
    ask({"model": model, "run": str(tmp_path)})
    found = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
