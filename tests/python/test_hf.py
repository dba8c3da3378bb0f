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
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_class", FAMILIES)
def test_the_catalog_of_every_family_is_that_of_its_model_class(model_class, tied):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 100}
    experts = {"num_experts": 3, "moe_intermediate_size": 20}
    config = FAMILIES[model_class](
        **sizes,
        **heads,
        **(experts if "Moe" in model_class else {}),
        tie_word_embeddings=tied,
        architectures=[model_class],
    )
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    catalog = transfuse.make_catalog(transfuse.parse_model_config(config.to_json_string()))
    assert {t.name: t.shape for t in catalog} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
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
