"""What cannot be served is refused, with every reason."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import saccade_vllm
import vllm
from saccade_vllm import cuda
from saccade_vllm.backend import _reasons
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from saccade.core.errors import BadOption, CannotRun
from saccade.engines.vllm import Settings


def test_registering_twice_changes_nothing():
    saccade_vllm.register()
    saccade_vllm.register()
    assert AttentionBackendEnum.CPU_ATTN.get_path() == "saccade_vllm.cpu.Backend"
    assert AttentionBackendEnum.CUSTOM.get_path() == "saccade_vllm.backend.Backend"


def test_another_minor_of_vllm_is_refused(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(CannotRun, match=r"this is vLLM 0\.33\.0, and the plug-in is written against 0\.32"):
        saccade_vllm.register()


def test_another_platform_is_refused(monkeypatch):
    for name in ("is_cpu", "is_cuda"):
        monkeypatch.setattr(type(current_platform), name, lambda _: False)
    with pytest.raises(CannotRun, match="the plug-in is for its CPU and CUDA builds"):
        saccade_vllm.register()


def test_a_backend_that_is_told_of_no_method_is_refused():
    with set_current_vllm_config(VllmConfig()), pytest.raises(CannotRun, match="additional_config has no 'saccade'"):
        AttentionBackendEnum.CUSTOM.get_class().get_impl_cls()(9, 64, 0.125, 3)


def cuda_config(backend=None, per_kind=(), settings=True):
    told = SimpleNamespace(backend=backend, backend_per_kind=per_kind)
    given = {"saccade": {"method": "minference"}} if settings else {}
    return SimpleNamespace(attention_config=told, additional_config=given)


def test_on_cuda_the_platform_names_our_backend_where_a_method_is_asked_for():
    seen = []
    platform = type("Platform", (), {"check_and_update_config": classmethod(lambda _, config: seen.append(config))})
    cuda.enter(platform)
    cuda.enter(platform)
    asked, plain = cuda_config(), cuda_config(settings=False)
    for config in (asked, asked, plain):
        platform.check_and_update_config(config)
    assert seen == [asked, asked, plain]
    assert asked.attention_config.backend is AttentionBackendEnum.CUSTOM and plain.attention_config.backend is None


@pytest.mark.parametrize(
    "given", [{"backend": AttentionBackendEnum.FLASH_ATTN}, {"per_kind": {"full_attention": "FLASH_ATTN"}}]
)
def test_on_cuda_another_backend_beside_a_method_is_refused(given):
    with pytest.raises(CannotRun, match="another attention backend, in which no method works"):
        cuda.choose(cuda_config(**given))


def config(**changes):
    """As much of vLLM's as is looked at."""
    made = {
        "scheduler_config": SimpleNamespace(enable_chunked_prefill=False),
        "cache_config": SimpleNamespace(enable_prefix_caching=False),
        "parallel_config": SimpleNamespace(world_size=1),
        "speculative_config": None,
        "kv_transfer_config": None,
        "additional_config": {},
    }
    return SimpleNamespace(**{**made, **changes})


def layer(**changes):
    made = {"sliding_window": None, "alibi_slopes": None, "sinks": None, "kv_sharing_target_layer_name": None}
    made |= {"attn_type": AttentionType.DECODER, "kv_cache_dtype": "auto"}
    return SimpleNamespace(**{**made, **changes})


def test_nothing_speaks_against_a_plain_model():
    assert _reasons(config(), layer()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scheduler_config": SimpleNamespace(enable_chunked_prefill=True)}, "enable_chunked_prefill=False"),
        ({"cache_config": SimpleNamespace(enable_prefix_caching=True)}, "enable_prefix_caching=False"),
        ({"parallel_config": SimpleNamespace(world_size=2)}, "in several workers"),
        ({"speculative_config": object()}, "speculative"),
        ({"kv_transfer_config": object()}, "KV connector"),
    ],
)
def test_a_vllm_set_up_otherwise_is_refused(changes, said):
    (reason,) = _reasons(config(**changes), layer())
    assert said in reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_window": 128}, "sliding window"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"sinks": object()}, "sink logit"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "keys of another"),
        ({"attn_type": AttentionType.ENCODER}, "encoder"),
        ({"kv_cache_dtype": "fp8"}, "stored as fp8"),
    ],
)
def test_a_model_of_another_kind_is_refused(changes, said):
    (reason,) = _reasons(config(), layer(**changes))
    assert said in reason


def test_settings_are_read_from_what_vllm_was_given():
    assert Settings.of({}) is None and Settings.of(None) is None
    given = {"saccade": {"method": "quest", "budget": "0.25"}}
    assert Settings.of(given) == Settings("quest", "0.25")
    with pytest.raises(BadOption, match=r"it has bugdet.*It takes: method, budget, seed, fingerprint"):
        Settings.of({"saccade": {"method": "quest", "bugdet": "0.25"}})
