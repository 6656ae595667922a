"""A real llama.cpp (the `xllamacpp` wheel) behind two questions, to compare exported files with."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest


class LlamaCpp:
    """A GGUF file loaded by llama.cpp. Skips the test where the wheel is missing; raises RuntimeError for bad files.

    Keys and values are cached as float32.
    """

    def __init__(self, path: str | Path, context: int = 512) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.cpuparams.n_threads = 2
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Flash attention keeps parts of its sums in float16, which moves log-probabilities by up to 0.007.
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.warmup = False
        settings.verbosity = -1
        # It also listens on a free port of this machine alone, which is the only way to its tokenizer.
        self._server = xllamacpp.Server(settings)
        self.vocabulary: int = self._ask("/v1/models")["data"][0]["meta"]["n_vocab"]

    def tokenize(self, text: str, control: bool = False) -> list[int]:
        """Ids without begin of text; control tokens in the text are characters unless `control`."""
        return self._ask("/tokenize", {"content": text, "add_special": False, "parse_special": control})["tokens"]

    def log_probabilities(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [vocabulary]: of each token after these; begin of text is not added."""
        question = {
            "prompt": [*ids],
            "n_predict": 1,
            "n_probs": self.vocabulary,
            "temperature": 0,
            "cache_prompt": False,
            # Of a token that is a part of a character the server says nothing. What is chosen changes no probability.
            "grammar": "root ::= [ -~]+",
        }
        top = self._ask("/completion", question)["completion_probabilities"][0]["top_logprobs"]
        found = np.full(self.vocabulary, -np.inf, np.float32)
        found[[entry["id"] for entry in top]] = [entry["logprob"] for entry in top]
        return found

    def _ask(self, route: str, question: dict[str, Any] | None = None) -> Any:
        body = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(
            self._server.listening_address + route, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
