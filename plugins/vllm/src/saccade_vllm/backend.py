"""The attention backend: vLLM's own where nobody asks for saccade, else one that does what a method says."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from saccade.core.budget import Budget
from saccade.core.errors import CannotRun
from saccade.core.method import Method
from saccade.core.site import Site, State
from saccade.engines.vllm import KEY, Settings
from saccade_vllm.freeing import FreeingSpec, freed_together
from saccade_vllm.working import Row, Work


def settings_of(config: VllmConfig) -> Settings | None:
    """What vLLM was told about saccade; None: nothing."""
    given = (config.additional_config or {}).get(KEY)
    return None if given is None else Settings.read(given)


class Backend(CPUAttentionBackend):
    """In the place of vLLM's CPU backend."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return CPUAttentionBackendImpl if settings_of(get_current_vllm_config()) is None else Impl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return Builder


class FreeingBackend(Backend):
    """Of layers whose blocks are given back; subclasses say under which settings."""

    settings: str
    sites: tuple[Site, ...]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        kept = {f.name: getattr(spec, f.name) for f in dataclasses.fields(AttentionSpec)}
        return FreeingSpec(**kept, settings=cls.settings, sites=cls.sites)


@dataclass(frozen=True)
class Metadata:
    """Of one step, for the layers of one group: which tokens are whose, and where they lie."""

    rows: list[Row]
    slots: Tensor


class Builder(CPUAttentionMetadataBuilder):
    """Says to the layers of a group what is read in a step."""

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False):
        if settings_of(self.vllm_config) is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        m = common_attn_metadata
        assert m.is_prefilling is not None, "vLLM's model runner says which requests still read their prompt"
        start, seen = m.query_start_loc_cpu.tolist(), m.seq_lens.tolist()
        rows = [
            Row(start[i], start[i + 1], seen[i], bool(m.is_prefilling[i]), m.block_table_tensor[i])
            for i in range(m.num_reqs)
            if start[i + 1] > start[i]
        ]
        return Metadata(rows, m.slot_mapping)


class Impl(CPUAttentionBackendImpl):
    """One attention layer in which a method works."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.config = get_current_vllm_config()
        self.settings = settings_of(self.config)
        reasons = _reasons(self.config, self)
        if reasons:
            raise CannotRun(f"serve {self.settings.method!r} with vLLM", reasons, "See: saccade export --to vllm")

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """All layers are there now: this one finds out which it is, and whether its blocks are given back."""
        super().process_weights_after_loading(act_dtype)
        layers, sites = _sites(self.config, self.settings)
        here = next(i for i, layer in enumerate(layers) if layer.impl is self)
        method, handed = _shared(self.settings)
        self.work = Work(method, sites[here], self.config.scheduler_config.max_num_seqs, handed)
        reasons = self.work.method.check(dataclasses.replace(sites[here], keys=self._longest, seen=self._longest))
        if reasons:
            raise CannotRun(f"serve {self.settings.method!r} with vLLM", reasons, "See: saccade export --to vllm")
        together = freed_together(self.settings, sites, self._longest)
        if here in together:
            text = json.dumps(dataclasses.asdict(self.settings))
            told = {"settings": text, "sites": tuple(sites[i] for i in together)}
            layers[here].attn_backend = type("FreeingBackend", (FreeingBackend,), told)

    @property
    def _longest(self) -> int:
        return self.config.model_config.max_model_len

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        self.work.write(kv_cache, key, value, slot_mapping)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Metadata | None,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if output_scale is not None or output_block_scale is not None:
            raise CannotRun("quantise what attention gives", "the plug-in does not", "Leave that fusion off.")
        if attn_metadata is not None:  # None: vLLM warms up
            self.work.attend(query, key, value, attn_metadata.rows, output)
        return output


@functools.lru_cache(maxsize=1)
def _shared(settings: Settings) -> tuple[Method, dict[int, State]]:
    """One method for all layers, which share what it caches, and what they hand on."""
    return settings.equipped(), {}


def _sites(config: VllmConfig, settings: Settings) -> tuple[list[Attention], tuple[Site, ...]]:
    """The attention layers of the model in their order, and what methods are told of each."""
    context = config.compilation_config.static_forward_context
    layers = [layer for layer in context.values() if isinstance(layer, Attention)]
    size = sum(2 * x.num_kv_heads * x.head_size * x.kv_cache_torch_dtype.itemsize for x in layers)
    sites = tuple(
        Site(
            layer=i, layers=len(layers), heads=x.num_heads, kv_heads=x.num_kv_heads, head_size=x.head_size,
            stage="prefill", queries=1, keys=1, seen=1, scale=x.impl.scale, softcap=x.impl.logits_soft_cap or None,
            budget=Budget.of(settings.budget), seed=settings.seed, bytes_per_token=size,
        )
        for i, x in enumerate(layers)
    )
    return layers, sites


def _reasons(config: VllmConfig, impl: CPUAttentionBackendImpl) -> list[str]:
    """Why this model, or a vLLM set up so, cannot be served; [] means that it can."""
    parallel = config.parallel_config
    found = {
        "prompts may come in chunks: set enable_chunked_prefill=False": config.scheduler_config.enable_chunked_prefill,
        "requests may share blocks: set enable_prefix_caching=False": config.cache_config.enable_prefix_caching,
        "tokens may be guessed and taken back: leave speculative decoding off": config.speculative_config is not None,
        "heads or layers lie in several workers, and methods rank those of a whole model": parallel.world_size > 1,
        "keys go to a KV connector, which counts on all blocks": config.kv_transfer_config is not None,
        "a layer has a sliding window of its own": impl.sliding_window != -1,
        "a layer has ALiBi slopes": impl.alibi_slopes is not None,
        "its softmax has a learned sink logit": impl.sinks is not None,
        "a layer takes the keys of another": impl.kv_sharing_target_layer_name is not None,
        f"its attention is that of an {AttentionType(impl.attn_type).value}": impl.attn_type != AttentionType.DECODER,
        f"keys are stored as {impl.kv_cache_dtype}": impl.is_fp8_kv_cache,
    }
    return [reason for reason, holds in found.items() if holds]
