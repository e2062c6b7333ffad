"""A tiny random llama with a tokenizer of one token per character, in a folder as `models.load` takes it."""

from __future__ import annotations

import functools
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from saccade import models


def tokenizer() -> PreTrainedTokenizerFast:
    """ASCII, one token a character; token n is character n."""
    letters = {chr(i): i for i in range(3, 127)} | {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 127}
    inner = Tokenizer(WordLevel(letters, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def save(folder: Path) -> Path:
    """Write model and tokenizer."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def model():
    """The model itself."""
    return models.tiny("llama")
