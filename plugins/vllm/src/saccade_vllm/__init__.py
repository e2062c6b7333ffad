"""Methods of saccade at work in vLLM. vLLM finds `register` by its entry point and calls it in each of its processes.

A vLLM that is told nothing about saccade runs as if this were not installed.
"""

from __future__ import annotations


def register() -> None:
    """Offer our attention backend and our kind of KV blocks to vLLM. Doing it twice changes nothing.

    Raises:
        CannotRun: another minor of vLLM than the one this is written against, or a platform other than CPU and CUDA.
    """
    import vllm
    from vllm.platforms import current_platform

    from saccade.core.errors import CannotRun
    from saccade.engines.vllm import MINOR

    do = "Install that, or leave the plug-in out: VLLM_PLUGINS=''"
    if not vllm.__version__.startswith(f"{MINOR}."):
        found = f"this is vLLM {vllm.__version__}, and the plug-in is written against {MINOR}"
        raise CannotRun("saccade in vLLM", found, do)
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        found = f"this vLLM runs on {current_platform.device_name!r}; the plug-in is for its CPU and CUDA builds"
        raise CannotRun("saccade in vLLM", found, do)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from saccade_vllm import cuda
    from saccade_vllm.freeing import FreeingManager, FreeingSpec

    register_backend(AttentionBackendEnum.CUSTOM, "saccade_vllm.backend.Backend")
    register_backend(AttentionBackendEnum.CPU_ATTN, "saccade_vllm.cpu.Backend")
    if current_platform.is_cuda():
        cuda.enter(type(current_platform))
    KVCacheSpecRegistry._ensure_registered()  # its own kinds first: it adds none to a registry that has some
    KVCacheSpecRegistry.register(FreeingSpec, FreeingManager, uniform_type_base_spec=FreeingSpec)
