"""Real text that every Debian or Ubuntu has, and a tokenizer of whole words and bytes."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from pathlib import Path

GPL = Path("/usr/share/common-licenses/GPL-3")
LEAST_CHARACTERS = 5000
_PIECES = re.compile(r" ?[A-Za-z]+|\s+|[^\sA-Za-z]+")
_BYTE_COUNT = 256


def read_corpus(path: Path | None = None) -> str:
    """The texts of a file or folder; by default the GPL, which the distribution ships."""
    path = path or GPL
    found = {p.resolve() for p in path.rglob("*")} if path.is_dir() else {path}
    texts = [p.read_text("utf-8", errors="replace") for p in sorted(found) if p.is_file()]
    paragraphs = (" ".join(p.split()) for text in texts for p in re.split(r"\n\s*\n", text))
    corpus = "\n".join(paragraph for paragraph in paragraphs if paragraph)
    if len(corpus) < LEAST_CHARACTERS:
        message = f"{path} has {len(corpus)} characters of text; {LEAST_CHARACTERS} are needed"
        raise FileNotFoundError(f"{message}: name other text with --text")
    return corpus


class Tokenizer:
    """The most frequent pieces of a text have a token each; all else is spelled in bytes."""

    def __init__(self, corpus: str, vocabulary_size: int) -> None:
        counts = collections.Counter(p for p in _PIECES.findall(corpus) if len(p.encode()) > 1)
        common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        self._pieces = [bytes([byte]) for byte in range(_BYTE_COUNT)]
        self._pieces += [piece.encode() for piece, _ in common[: vocabulary_size - _BYTE_COUNT]]
        self._tokens = {piece: token for token, piece in enumerate(self._pieces)}

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        tokens: list[int] = []
        for piece in _PIECES.findall(text):
            data = piece.encode()
            token = self._tokens.get(data)
            tokens.extend(data if token is None else [token])
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; tokens beyond the vocabulary give nothing."""
        known = (self._pieces[token] for token in tokens if token < len(self._pieces))
        return b"".join(known).decode("utf-8", errors="replace")
