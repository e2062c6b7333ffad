"""Tokenizers that differ in all that tasks may stumble over: letters, words with their spaces, a start token."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from saccade import models
from saccade.models.known import folder
from saccade.tasks import moby_dick
from tests.measure.small import tokenizer as letters

LEARNT_CHARACTERS = 40_000


@functools.cache
def get(name: str):
    """letters: one token a character; merges: byte pairs of the shipped text; start: the same with <s> before."""
    if name == "smollm2":
        return AutoTokenizer.from_pretrained(folder("smollm2"))
    if name == "letters":
        return letters()
    return PreTrainedTokenizerFast(tokenizer_object=_merges(start=name == "start"), bos_token="<s>")


def _merges(start: bool) -> Tokenizer:
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<s>"], "initial_alphabet": alphabet, "show_progress": False}
    inner.train_from_iterator([moby_dick()[:LEARNT_CHARACTERS]], trainers.BpeTrainer(vocab_size=1500, **options))
    if start:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return inner


NAMES = ("letters", "merges", "start", *(["smollm2"] if models.is_cached("smollm2") else []))
