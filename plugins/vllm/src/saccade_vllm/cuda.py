"""How a vLLM on CUDA comes to take our backend. All else is the same on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from saccade.core.errors import CannotRun
from saccade.engines.vllm import ON_CUDA, SEEN, Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.platforms.interface import Platform

log = init_logger("vllm.saccade")


def enter(platform: type[Platform]) -> None:
    """From now on a configuration that names a method also names our backend.

    vLLM asks the platform to go over every configuration, and has no other place where a plug-in sees one.
    """
    before = platform.check_and_update_config
    if getattr(before, "by_saccade", False):
        return

    def check_and_update_config(vllm_config: VllmConfig) -> None:
        before(vllm_config)
        choose(vllm_config)

    check_and_update_config.by_saccade = True
    platform.check_and_update_config = staticmethod(check_and_update_config)


def choose(config: VllmConfig) -> None:
    """Our backend where the settings name a method.

    Raises:
        CannotRun: another backend is asked for as well, which would leave the method out.
    """
    settings, told = Settings.of(config.additional_config), config.attention_config
    if settings is None:
        return
    if told.backend not in (None, AttentionBackendEnum.CUSTOM) or told.backend_per_kind:
        found = "vLLM was told of another attention backend, in which no method works"
        raise CannotRun(f"serve {settings.method!r} with vLLM", found, "Leave that backend out.")
    if settings.method.partition(":")[0] not in SEEN:
        log.warning_once("saccade: %s in vLLM on CUDA is %s", settings.method, ON_CUDA["untried"])
    told.backend = AttentionBackendEnum.CUSTOM
