"""In the place of vLLM's CPU backend, also where nobody asks for saccade: its CPU platform takes no other by name."""

from __future__ import annotations

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from saccade.engines.vllm import Settings
from saccade_vllm.backend import Impl


class Backend(CPUAttentionBackend):
    """vLLM's own, but for the layers in which a method works: they leave it for ours once they are loaded."""

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        settings = Settings.of(get_current_vllm_config().additional_config)
        return CPUAttentionBackendImpl if settings is None else Impl
