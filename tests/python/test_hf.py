"""Layouts of plain modules: names, tied weights, views of one storage, a transformers model."""

from __future__ import annotations

import pytest
import torch
import transfuse
from transfuse import hf

transformers = pytest.importorskip("transformers")


def tiny_qwen3(tied=True):
    config = transformers.Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return config, transformers.Qwen3ForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_names_and_shapes_of_qwen3_are_those_of_the_published_checkpoint(tied):
    config, model = tiny_qwen3(tied)
    layout, parameters = hf.layout(model)
    text = transformers.Qwen3Config.to_json_string(config, use_diff=False)
    if '"architectures": null' in text:
        text = text.replace('"architectures": null', '"architectures": ["Qwen3ForCausalLM"]')
    catalog = transfuse.make_catalog(transfuse.parse_model_config(text))
    assert {(t.name, t.shape) for t in layout.tensors} == {(t.name, t.shape) for t in catalog}
    assert set(parameters) == {p.name for p in layout.parameters}
    assert ("lm_head.weight" in parameters) is not tied


FAMILIES = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "Qwen3MoeForCausalLM": transformers.Qwen3MoeConfig,
    "MixtralForCausalLM": transformers.MixtralConfig,
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig,
    "Glm4MoeForCausalLM": transformers.Glm4MoeConfig,
    "DeepseekV3ForCausalLM": transformers.DeepseekV3Config,
    "GptOssForCausalLM": transformers.GptOssConfig,
    "Qwen3NextForCausalLM": transformers.Qwen3NextConfig,
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
# Modules of transformers have no layer that predicts further tokens, whatever the config says.
ROUTED = {
    "n_routed_experts": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
MORE = {
    "Qwen3MoeForCausalLM": {"num_experts": 3, "moe_intermediate_size": 20},
    "MixtralForCausalLM": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Gemma3ForCausalLM": {"head_dim": 6},
    "Glm4MoeForCausalLM": {**ROUTED, "moe_intermediate_size": 20, "attention_bias": True},
    "DeepseekV3ForCausalLM": {
        **ROUTED,
        "moe_intermediate_size": 20,
        "q_lora_rank": 12,
        "kv_lora_rank": 7,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 2,
        "v_head_dim": 5,
        "n_group": 1,
        "topk_group": 1,
    },
    "GptOssForCausalLM": {"num_local_experts": 3, "head_dim": 6},
    "Qwen3NextForCausalLM": {
        "num_experts": 3,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 12,
        "head_dim": 6,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 5,
        "linear_value_head_dim": 7,
        "linear_conv_kernel_dim": 3,
        "num_hidden_layers": 5,
        "num_nextn_predict_layers": 0,  # not in the model class of transformers
    },
}


def config_of(model_class, **more):
    sizes = SIZES | MORE.get(model_class, {}) | more
    return FAMILIES[model_class](**sizes, architectures=[model_class])


def catalog_of(config):
    return transfuse.make_catalog(transfuse.parse_model_config(config.to_json_string()))


def held_by(model):
    """Parameters and persistent buffers; a tied one once."""
    published = set(model.state_dict())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(t.shape) for name, t in tensors if name in published}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_class", FAMILIES)
def test_the_catalog_of_every_family_is_that_of_its_model_class(model_class, tied):
    config = config_of(model_class, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("transformers 5 holds experts in stacks: the next test")
    assert {t.name: t.shape for t in catalog_of(config)} == held_by(model)


def test_the_norms_of_queries_and_keys_of_glm_are_there_where_the_config_says_so():
    config = config_of("Glm4MoeForCausalLM", use_qk_norm=True, attention_bias=False)
    with torch.device("meta"):
        model = transformers.Glm4MoeForCausalLM(config)
    assert {t.name: t.shape for t in catalog_of(config)} == held_by(model)


class Stacked(torch.nn.Module):
    """What modules of transformers 5 hold of a checkpoint's layer with experts."""

    def __init__(self, weights, names, module):
        super().__init__()
        self.rest = torch.nn.ParameterDict()
        stacks = {}
        for name, value in weights.items():
            head, found, tail = name.partition(".experts.")
            head = head.replace(f".{module}", ".mlp")
            if not found:
                name = name.replace(f".{module}.", ".mlp.")
                self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(value))
                continue
            expert, matrix, _ = tail.split(".")
            stacks.setdefault(head, {})[int(expert), names.index(matrix)] = value
        for head, parts in stacks.items():
            count = 1 + max(expert for expert, _ in parts)
            gate_up = [torch.cat([parts[x, 0], parts[x, 1]]) for x in range(count)]
            down = [parts[x, 2] for x in range(count)]
            for name, stack in (("gate_up_proj", gate_up), ("down_proj", down)):
                name = f"{head}.experts.{name}".replace(".", "/")
                self.register_parameter(name, torch.nn.Parameter(torch.stack(stack)))

    def named_parameters(self, *args, **kwargs):
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.replace("/", "."), parameter


def numbered(catalog):
    weights, first = {}, 1
    for tensor in catalog:
        count = torch.Size(tensor.shape).numel()
        weights[tensor.name] = torch.arange(first, first + count).float().view(tensor.shape)
        first += count
    return weights


@pytest.mark.parametrize(
    ("model_class", "names", "module"),
    [
        ("Qwen3MoeForCausalLM", ["gate_proj", "up_proj", "down_proj"], "mlp"),
        ("MixtralForCausalLM", ["w1", "w3", "w2"], "block_sparse_moe"),
        ("DeepseekV3ForCausalLM", ["gate_proj", "up_proj", "down_proj"], "mlp"),
    ],
)
def test_stacked_experts_of_a_live_module_meet_the_catalog(execute, model_class, names, module):
    config = transfuse.parse_model_config(config_of(model_class).to_json_string())
    weights = numbered(transfuse.make_catalog(config))
    live = Stacked(weights, names, module)
    layout, parameters = hf.layout(live, config=config)
    assert {t.name: t.shape for t in layout.tensors} == {
        n: tuple(w.shape) for n, w in weights.items()
    }
    spec = transfuse.parse_parallel_spec("hf:experts=stacked,dtype=f32")
    described = transfuse.make_layout(config, spec, 0)
    assert [(p.name, p.element_count) for p in layout.parameters] == [
        (p.name, p.element_count) for p in described.parameters
    ]
    assert layout.tiles == described.tiles
    assert {p.name for p in layout.parameters} == set(parameters)

    # Out of the live module into single experts, and back into another live module.
    single = transfuse.make_layout(config, transfuse.parse_parallel_spec("hf:dtype=f32"), 0)
    held = {p.name: torch.zeros(p.element_count) for p in single.parameters}
    execute(transfuse.compile(single, [layout]), [(layout, parameters)], held)
    for name, value in weights.items():
        assert torch.equal(held[name], value.flatten()), name
    other = Stacked({n: torch.zeros_like(w) for n, w in weights.items()}, names, module)
    target, target_parameters = hf.layout(other, config=config)
    execute(transfuse.compile(target, [single]), [(single, held)], target_parameters)
    for (name, value), (_, expected) in zip(
        other.named_parameters(), live.named_parameters(), strict=True
    ):
        assert torch.equal(value, expected), name


def test_a_config_of_another_size_than_the_module_is_refused_by_name():
    config = config_of("MixtralForCausalLM")
    weights = numbered(catalog_of(config))
    other = config_of("MixtralForCausalLM", num_local_experts=4).to_json_string()
    live = Stacked(weights, ["w1", "w3", "w2"], "block_sparse_moe")
    with pytest.raises(transfuse.InvalidArgumentError, match=r"the config says \d+ elements"):
        hf.layout(live, config=transfuse.parse_model_config(other))


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 5 is not installed"
)
@pytest.mark.parametrize("model_class", [c for c in FAMILIES if c != "Gemma3ForCausalLM"])
def test_modules_of_transformers_5_meet_the_catalog(model_class):
    config = config_of(model_class)
    model = getattr(transformers, model_class)(config)
    read = transfuse.parse_model_config(config.to_json_string())
    layout, _ = hf.layout(model, buffers=True, config=read)
    assert {(t.name, t.shape) for t in layout.tensors} == {
        (t.name, t.shape) for t in transfuse.make_catalog(read)
    }


def test_one_model_lands_in_another_and_its_logits_are_equal(execute):
    _, source = tiny_qwen3()
    _, target = tiny_qwen3()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    source_layout, source_parameters = hf.layout(source)
    target_layout, target_parameters = hf.layout(target)
    plan = transfuse.compile(target_layout, [source_layout])
    execute(plan, [(source_layout, source_parameters)], target_parameters)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(source(tokens).logits, target(tokens).logits)


def test_a_tied_weight_has_both_names_on_request():
    _, model = tiny_qwen3()
    layout, parameters = hf.layout(model, aliases=True)
    assert layout.find_tensor("lm_head.weight") is not None
    assert layout.find_tensor("model.embed_tokens.weight") is not None
    assert ("lm_head.weight" in parameters) != ("model.embed_tokens.weight" in parameters)


def test_a_trainer_with_both_names_feeds_an_engine_that_holds_them_apart(execute):
    _, trainer = tiny_qwen3(tied=True)
    _, engine = tiny_qwen3(tied=False)
    source, source_parameters = hf.layout(trainer, aliases=True)
    target, target_parameters = hf.layout(engine)
    plan = transfuse.compile(target, [source])
    execute(plan, [(source, source_parameters)], target_parameters)
    assert torch.equal(engine.lm_head.weight, trainer.model.embed_tokens.weight)


def test_a_transposed_parameter_keeps_its_strides(execute):
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.arange(24.0).view(4, 6).t())
    layout, parameters = hf.layout(module)
    assert layout.tensors[0].shape == (6, 4)
    assert layout.tiles[0].element_strides == (1, 6)
    plain = torch.nn.Module()
    plain.w = torch.nn.Parameter(torch.zeros(6, 4))
    target, target_parameters = hf.layout(plain)
    execute(transfuse.compile(target, [layout]), [(layout, parameters)], target_parameters)
    assert torch.equal(plain.w, module.w)


def test_views_that_interleave_in_one_storage_become_one_parameter():
    fused = torch.arange(24.0).view(4, 6)
    module = torch.nn.Module()
    module.left = torch.nn.Parameter(fused[:, :2])
    module.right = torch.nn.Parameter(fused[:, 2:])
    layout, parameters = hf.layout(module)
    assert list(parameters) == ["left"]
    assert parameters["left"].numel() == 24
    assert parameters["left"].data_ptr() == fused.data_ptr()
    assert transfuse.diagnose(layout, [layout]) == []


def test_views_that_follow_each_other_in_one_storage_stay_apart():
    fused = torch.arange(24.0).view(4, 6)
    module = torch.nn.Module()
    module.top = torch.nn.Parameter(fused[:1])
    module.rest = torch.nn.Parameter(fused[1:])
    _, parameters = hf.layout(module)
    assert {name: p.numel() for name, p in parameters.items()} == {"top": 6, "rest": 18}


def test_names_of_wrappers_are_left_out():
    module = torch.nn.Module()
    module._orig_mod = torch.nn.Linear(2, 2, bias=False)
    assert list(hf.layout(module)[1]) == ["weight"]


def test_persistent_buffers_come_on_request():
    module = torch.nn.BatchNorm1d(3)
    assert set(hf.layout(module)[1]) == {"weight", "bias"}
    names = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    layout, parameters = hf.layout(module, buffers=True)
    assert set(parameters) == names
    assert transfuse.diagnose(layout, [layout]) == []


def test_a_parameter_without_memory_is_refused_by_name():
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    with pytest.raises(transfuse.UnsupportedError, match=r"weight.*meta"):
        hf.layout(module)


def test_a_dtype_without_counterpart_is_refused_by_name():
    with pytest.raises(transfuse.UnsupportedError, match=r"weight.*float64"):
        hf.layout(torch.nn.Linear(2, 2, dtype=torch.float64))
