"""KV blocks that are given back while a request runs: those that no head of a group of layers sees any more.

The scheduler frees blocks, in a process of its own, by numbers alone: `Method.reach` says how many first and recent
tokens each head sees at a position. Where heads differ, what all heads of all layers in a group give up is freed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec

from saccade.core.site import Site
from saccade.engines.vllm import Settings
from saccade_vllm.reaching import gap


@dataclass(frozen=True, kw_only=True)
class FreeingSpec(AttentionSpec):
    """Of layers in which a method lets keys go.

    settings: as JSON. sites: of the layers that are freed together
    """

    settings: str
    sites: tuple[Site, ...]

    @property
    def prefix_cacheable(self) -> bool:
        return False

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of the longest request, whose prompt is all there before anything goes."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


class FreeingManager(FullAttentionManager):
    """Gives back the blocks of a group of layers that no head sees any more."""

    def __init__(self, kv_cache_spec: FreeingSpec, **others: Any) -> None:
        super().__init__(kv_cache_spec, **others)
        self.method = Settings.read(json.loads(kv_cache_spec.settings)).equipped()
        self.sites = kv_cache_spec.sites
        self.prompts: dict[str, int] = {}  # tokens that a running request read at first

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        if not self.req_to_blocks.get(request_id):
            self.prompts[request_id] = num_tokens_main_model
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.prompts.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """What the next query, at the position `processed_computed_tokens`, is the first not to see."""
        prompt = self.prompts.get(request_id)
        if prompt is None or processed_computed_tokens < prompt:
            return
        first, last = gap(self.method, self.sites, prompt, processed_computed_tokens)
        # the first block stays: by it the worker knows the request
        self._remove_blocks_in_range(request_id, max(1, cdiv(first, self.block_size)), last // self.block_size)
