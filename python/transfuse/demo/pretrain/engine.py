"""The inference process: holds the model in bf16, brings versions in and generates text.

Usage: python -m transfuse.demo.pretrain.engine <settings>
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import transformers

import transfuse
from transfuse import hf
from transfuse.demo.channel import answer, commands
from transfuse.demo.devices import device_of
from transfuse.demo.layouts import save_layout
from transfuse.demo.memcpy import Memcpy
from transfuse.demo.plots import PHASES
from transfuse.demo.pretrain.settings import MODEL, TRAINERS, Settings
from transfuse.demo.pretrain.text import Tokenizer, read_corpus

PROMPT = "This License"


def logits_of(model: torch.nn.Module, settings: Settings) -> torch.Tensor:
    """Of a fixed input, in memory of the host."""
    tokens = torch.arange(settings.context)[None] * 7 % settings.vocabulary
    tokens = tokens.to(next(model.parameters()).device)
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return result.cpu()


def first_model(settings: Settings) -> transformers.Qwen3ForCausalLM:
    """In bf16 where the engine has it, with other weights than the trainers begin with."""
    torch.manual_seed(settings.seed + 1000)
    model: transformers.Qwen3ForCausalLM = transformers.Qwen3ForCausalLM(settings.model_config())
    torch.nn.Module.to(model.eval(), device_of(settings.device, TRAINERS), torch.bfloat16)
    return model


class Engine:
    """The model as transformers serves it, its tokenizer and its receiver."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        corpus = read_corpus(Path(settings.text) if settings.text else None)
        self._tokenizer = Tokenizer(corpus, settings.vocabulary)
        self.model = first_model(settings)
        self._device = next(self.model.parameters()).device
        self.layout, self.parameters = hf.layout(self.model)
        save_layout(settings.path, "engine0", self.layout)
        self._memcpy = Memcpy(self.layout.parameter_bytes, self._device)

    def open_receiver(self) -> transfuse.Receiver:
        """The receiver; one that was killed may count as alive for a moment longer."""
        give_up = time.monotonic() + self.settings.deadline_s
        while True:
            try:
                return transfuse.Receiver(
                    self.layout, self.parameters, name="engine0", model=MODEL, job=self.settings.job
                )
            except transfuse.AlreadyExistsError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.1)

    def refit(self, receiver: transfuse.Receiver, at_least: int) -> None:
        """Brings a version in and answers with the report and with memcpy at this moment."""
        report = receiver.refit(at_least=at_least, timeout_s=self.settings.deadline_s)
        answer(
            "refitted",
            version=report.version,
            verified=report.verified_bytes == report.size_bytes == self.layout.parameter_bytes,
            memcpy_gbps=self._memcpy.gigabytes_per_second(),
            report=json.loads(report.to_json()),
            phases_us={name: getattr(report.phases, f"{name}_us") for name in (*PHASES, "total")},
            gbps=report.gigabytes_per_second,
            routes=sorted({route.route for route in report.routes}),
        )

    def sample(self) -> str:
        """Text from the weights that are here now."""
        prompt = torch.tensor([self._tokenizer.encode(PROMPT)], device=self._device)
        torch.manual_seed(self.settings.seed)
        with torch.no_grad():
            tokens = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.settings.sample_tokens,
                do_sample=True,
                temperature=0.7,
                top_k=20,
                pad_token_id=0,
                eos_token_id=None,
            )
        return self._tokenizer.decode(tokens[0].tolist())


def serve(engine: Engine, receiver: transfuse.Receiver) -> None:
    """Serves commands until the end of input."""
    answer("ready", parameters=sum(p.numel() for p in engine.model.parameters()))
    for command in commands():
        if command["do"] == "refit":
            engine.refit(receiver, command["at_least"])
        elif command["do"] == "sample":
            answer("sampled", version=receiver.version, text=engine.sample())
        elif command["do"] == "state":
            state = {
                "logits": logits_of(engine.model, engine.settings),
                "parameters": {n: p.detach().cpu() for n, p in engine.model.named_parameters()},
            }
            torch.save(state, command["path"])
            answer("state", version=receiver.version)


def main() -> None:
    """Opens the receiver and serves."""
    settings = Settings.from_json(sys.argv[1])
    torch.set_num_threads(1)
    engine = Engine(settings)
    with engine.open_receiver() as receiver:
        serve(engine, receiver)


if __name__ == "__main__":
    main()
