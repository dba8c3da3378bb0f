"""The policy as Megatron-Core's own model, gradient buffers and optimizer, on CPUs over gloo."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import transfuse
from transfuse import hf, megatron
from transfuse.demo.rl.settings import Settings
from transfuse.demo.rl.trainer import Trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says of every GPU package that it is not there
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY_MULTIPLE = 128  # Megatron's --make-vocab-size-divisible-by
FIRST_MODEL = "first"  # with the number of a rank, which publishes it to itself


class CudaIsCpu(TorchFunctionMode):
    """Megatron-Core names its device in many places, and checks for it: here that is the CPU."""

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401, ARG002
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        given = dict(kwargs or {})
        if str(given.get("device", "")).startswith("cuda"):
            given["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        found = func(*args, **given)
        if func is torch.Tensor.type and isinstance(found, str):
            return found.replace("torch.", "torch.cuda.")
        return found


class MegatronTrainer(Trainer):
    """Megatron-Core under tensor parallelism. Its first weights come by a refit."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        spec = transfuse.parse_parallel_spec(settings.trainer)
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
        with CudaIsCpu():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=spec.tp)
            tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
            config = _transformer_config(settings.model_config(), spec.tp)
            self._model = DistributedDataParallel(
                config,
                DistributedDataParallelConfig(use_distributed_optimizer=False),
                _model(config, settings.model_config()),
            )
            self._optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=settings.learning_rate,
                    adam_beta1=0.9,
                    adam_beta2=0.95,
                    weight_decay=0.0,
                    clip_grad=1.0,
                ),
                [self._model],
            )
        self._refit_first_weights()

    def layout(self) -> tuple[transfuse.Layout, dict[str, torch.Tensor]]:
        """See Trainer."""
        config = transfuse.parse_model_config(json.dumps(self.settings.model_config()))
        return megatron.layout(self._model, config)

    def logits(self, text: torch.Tensor) -> torch.Tensor:
        """See Trainer."""
        length = text.shape[1]
        later = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        with CudaIsCpu():
            logits = self._model(text, torch.arange(length)[None].expand(text.shape), later)
        found: torch.Tensor = logits[..., : self.settings.model_config()["vocab_size"]]
        return found  # without those of the padding

    def learn(self, loss: torch.Tensor, learning_rate: float) -> None:
        """See Trainer."""
        with CudaIsCpu():
            self._model.zero_grad_buffer()
            self._optimizer.zero_grad()
            loss.backward()
            finalize_model_grads([self._model])
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()

    def _refit_first_weights(self) -> None:
        """From a whole checkpoint model in this process into Megatron's modules, as any refit."""
        settings = self.settings
        layout, parameters = hf.layout(self.first_model())
        name = f"{FIRST_MODEL}{torch.distributed.get_rank()}"
        with transfuse.Publisher(
            layout, parameters, name="checkpoint", model=name, source_count=1, job=settings.job
        ) as publisher:
            publisher.begin_write(1)
            publisher.publish(1)
            layout, parameters = self.layout()
            with transfuse.Receiver(
                layout, parameters, name="megatron", model=name, job=settings.job
            ) as receiver:
                receiver.refit(timeout_s=settings.deadline_s)


def _transformer_config(model: Mapping[str, Any], tp: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=model["num_hidden_layers"],
        hidden_size=model["hidden_size"],
        ffn_hidden_size=model["intermediate_size"],
        num_attention_heads=model["num_attention_heads"],
        num_query_groups=model["num_key_value_heads"],
        kv_channels=model["head_dim"],
        normalization="RMSNorm",
        layernorm_epsilon=model["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        tensor_model_parallel_size=tp,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        # Fused kernels are for GPUs.
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )


def _model(config: TransformerConfig, model: Mapping[str, Any]) -> GPTModel:
    multiple = VOCABULARY_MULTIPLE * config.tensor_model_parallel_size
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=True, normalization=config.normalization),
        vocab_size=-(-model["vocab_size"] // multiple) * multiple,
        max_sequence_length=model["max_position_embeddings"],
        share_embeddings_and_output_weights=model["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=int(model["rope_theta"]),
        parallel_output=False,
    )
