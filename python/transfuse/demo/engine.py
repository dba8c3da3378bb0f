"""The inference process: holds the model in bf16, brings versions in and generates text.

Usage: python -m transfuse.demo.engine <settings>
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

import transfuse
from transfuse import hf
from transfuse.demo.channel import answer, commands
from transfuse.demo.settings import MODEL, Settings
from transfuse.demo.text import Tokenizer, read_corpus

PROMPT = "This License"


def logits_of(model: torch.nn.Module, settings: Settings) -> torch.Tensor:
    """Of a fixed input."""
    tokens = torch.arange(settings.context)[None] * 7 % settings.vocabulary
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return result


class Memcpy:
    """What memcpy reaches at this moment with the threads that a refit uses.

    The buffers take turns, so that they are no more in the caches than weights that another process
    has just written.
    """

    _FOOTPRINT_BYTES = 128 << 20  # beyond the last-level cache of most machines
    _ROUNDS = 5

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._threads = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads)
        pairs = max(1, min(64, self._FOOTPRINT_BYTES // (2 * size_bytes)))
        self._pairs = itertools.cycle(
            (torch.ones(size_bytes, dtype=torch.uint8), torch.zeros(size_bytes, dtype=torch.uint8))
            for _ in range(pairs)
        )

    def gigabytes_per_second(self) -> float:
        """The median of some copies of as many bytes as a refit writes."""
        share = -(-self._size_bytes // self._threads)
        seconds = []
        for _ in range(self._ROUNDS):
            source, target = next(self._pairs)

            addresses = (target.data_ptr(), source.data_ptr())

            def copy(index: int, addresses: tuple[int, int] = addresses) -> None:
                begin = min(index * share, self._size_bytes)
                count = min(share, self._size_bytes - begin)
                ctypes.memmove(addresses[0] + begin, addresses[1] + begin, count)

            start = time.perf_counter()
            list(self._pool.map(copy, range(self._threads)))
            seconds.append(time.perf_counter() - start)
        return self._size_bytes / sorted(seconds)[self._ROUNDS // 2] / 1e9


class Engine:
    """The model as transformers serves it, its tokenizer and its receiver."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        corpus = read_corpus(Path(settings.text) if settings.text else None)
        self._tokenizer = Tokenizer(corpus, settings.vocabulary)
        torch.manual_seed(settings.seed + 1000)  # other weights than the trainers begin with
        self.model = transformers.Qwen3ForCausalLM(settings.model_config()).eval()
        torch.nn.Module.to(self.model, torch.bfloat16)
        self.layout, self.parameters = hf.layout(self.model)
        (settings.path / "engine0.layout").write_bytes(self.layout.encode())
        self._memcpy = Memcpy(self.layout.parameter_bytes)

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
            phases_us={
                name: getattr(report.phases, f"{name}_us")
                for name in ("discover", "lease", "transfer", "verify", "commit", "total")
            },
            gbps=report.gigabytes_per_second,
            routes=sorted({route.route for route in report.routes}),
        )

    def sample(self) -> str:
        """Text from the weights that are here now."""
        prompt = torch.tensor([self._tokenizer.encode(PROMPT)])
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
                "parameters": {n: p.detach() for n, p in engine.model.named_parameters()},
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
