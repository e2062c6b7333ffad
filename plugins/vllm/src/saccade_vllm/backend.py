"""The attention backend in which a method works, on whatever device vLLM runs."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from saccade.core.budget import Budget
from saccade.core.errors import CannotRun
from saccade.core.method import Method
from saccade.core.site import Site, State
from saccade.engines.vllm import KEY, Settings
from saccade_vllm.freeing import FreeingSpec
from saccade_vllm.reaching import freed_together
from saccade_vllm.working import Row, Work


class Backend(AttentionBackend):
    """Of the layers of a model in which a method works. Its blocks may lie in memory in any order.

    `Impl.forward` stores the new keys as well: a graph that vLLM captures never holds it, and may hold a store apart.
    """

    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
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


class Builder(AttentionMetadataBuilder[Metadata]):
    """Says to the layers of a group what is read in a step."""

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        """Rows of real requests alone: what vLLM makes up to capture graphs is no prompt, and has none behind it."""
        m = common_attn_metadata
        assert m.is_prefilling is not None, "vLLM's model runner says which requests still read their prompt"
        start, seen = m.query_start_loc_cpu.tolist(), m.seq_lens.tolist()
        first, prompt = m.block_table_tensor[:, 0].tolist(), m.is_prefilling.tolist()
        rows = [
            Row(start[i], start[i + 1], seen[i], prompt[i], m.block_table_tensor[i], first[i])
            for i in range(m.num_reqs)
            if start[i + 1] > start[i] and (prompt[i] or seen[i] > start[i + 1] - start[i])
        ]
        return Metadata(rows, m.slot_mapping[: m.num_actual_tokens])


class Impl(AttentionImpl[Metadata]):
    """One attention layer in which a method works."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None, attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None, sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.alibi_slopes, self.sliding_window, self.sinks = alibi_slopes, sliding_window, sinks
        self.kv_cache_dtype, self.logits_soft_cap, self.attn_type = kv_cache_dtype, logits_soft_cap, attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.config = get_current_vllm_config()
        self.settings = Settings.of(self.config.additional_config)
        if self.settings is None:
            do = "Leave the backend to vLLM, or see: saccade export METHOD --to vllm"
            raise CannotRun("attend with a method of saccade", f"additional_config has no {KEY!r} to name one", do)
        reasons = _reasons(self.config, self)
        if reasons:
            raise CannotRun(f"serve {self.settings.method!r} with vLLM", reasons, "See: saccade export --to vllm")

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """All layers are there now: this one finds out which it is, and whether its blocks are given back."""
        layers, sites = _sites(self.config, self.settings)
        here = next(i for i, layer in enumerate(layers) if layer.impl is self)
        method, handed = _shared(self.settings)
        self.work = Work(method, sites[here], self.config.scheduler_config.max_num_seqs, handed)
        reasons = self.work.method.check(dataclasses.replace(sites[here], keys=self._longest, seen=self._longest))
        if reasons:
            raise CannotRun(f"serve {self.settings.method!r} with vLLM", reasons, "See: saccade export --to vllm")
        layers[here].attn_backend = Backend
        together = freed_together(self.settings, sites, self._longest)
        if here in together:
            text = json.dumps(dataclasses.asdict(self.settings))
            told = {"settings": text, "sites": tuple(sites[i] for i in together)}
            layers[here].attn_backend = type("FreeingBackend", (FreeingBackend,), told)

    @property
    def _longest(self) -> int:
        return self.config.model_config.max_model_len

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Metadata | None,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if output_scale is not None or output_block_scale is not None:
            raise CannotRun("quantise what attention gives", "the plug-in does not", "Leave that fusion off.")
        if attn_metadata is None or not attn_metadata.rows:  # vLLM warms up, or captures graphs
            return output.fill_(0)
        self.work.write(kv_cache, key, value, attn_metadata.slots)
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


def _reasons(config: VllmConfig, impl: Impl) -> list[str]:
    """Why this model, or a vLLM set up so, cannot be served; [] means that it can."""
    parallel = config.parallel_config
    found = {
        "prompts may come in chunks: set enable_chunked_prefill=False": config.scheduler_config.enable_chunked_prefill,
        "requests may share blocks: set enable_prefix_caching=False": config.cache_config.enable_prefix_caching,
        "tokens may be guessed and taken back: leave speculative decoding off": config.speculative_config is not None,
        "heads or layers lie in several workers, and methods rank those of a whole model": parallel.world_size > 1,
        "keys go to a KV connector, which counts on all blocks": config.kv_transfer_config is not None,
        "a layer has a sliding window of its own": impl.sliding_window is not None,
        "a layer has ALiBi slopes": impl.alibi_slopes is not None,
        "its softmax has a learned sink logit": impl.sinks is not None,
        "a layer takes the keys of another": impl.kv_sharing_target_layer_name is not None,
        f"its attention is that of an {AttentionType(impl.attn_type).value}": impl.attn_type != AttentionType.DECODER,
        f"keys are stored as {impl.kv_cache_dtype}": is_quantized_kv_cache(impl.kv_cache_dtype),
    }
    return [reason for reason, holds in found.items() if holds]
