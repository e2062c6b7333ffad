"""A model over several processes, devices or the disk: what `load` hands on to transformers, once it can work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.core.errors import BadOption, CannotRun
from saccade.core.shard import uneven


@dataclass(frozen=True)
class Spread:
    """given: arguments of `from_pretrained`; {}: the model is whole, on one device."""

    given: Mapping[str, Any]

    @classmethod
    def of(cls, device: Any, tp_plan: str | None, device_map: Any, offload_folder: str | Path | None) -> Spread:
        """Read what `load` was given.

        Raises:
            BadOption: more than one of the first three, another plan than "auto", or a folder for nothing.
        """
        named = {"device": device, "tp_plan": tp_plan, "device_map": device_map}
        said = [name for name, value in named.items() if value is not None]
        if len(said) > 1:
            raise BadOption(f"load with {' and '.join(said)}", "each says where the model lies", "Give one of them.")
        if tp_plan not in (None, "auto"):
            raise BadOption(f"tp_plan={tp_plan!r}", "'auto' is the plan that a model brings along", "Say 'auto'.")
        if offload_folder is not None and device_map is None:
            found = "nothing is put there without a device_map"
            raise BadOption(f"offload_folder={str(offload_folder)!r}", found, "Give a device_map too.")
        given = {"tp_plan": tp_plan, "device_map": device_map, "offload_folder": offload_folder}
        return cls({name: value for name, value in given.items() if value is not None})

    def check(self, config: Any, name: str) -> None:
        """Before anything is loaded.

        Raises:
            CannotRun: `tp_plan` without a torchrun, or with one whose processes cannot share the heads.
        """
        if "tp_plan" not in self.given:
            return
        asked, ranks = f"load {name!r} with tp_plan='auto'", os.environ.get("WORLD_SIZE")
        if ranks is None:
            do = "Start it with torchrun --nproc_per_node 2, or leave tp_plan away."
            raise CannotRun(asked, "this is one process", do)
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        reasons = uneven(heads, getattr(text, "num_key_value_heads", None) or heads, int(ranks))
        if reasons:
            raise CannotRun(asked, reasons, "Start as many processes as divide both numbers.")

    def refuse_gguf(self, name: str) -> None:
        """A GGUF file is read whole.

        Raises:
            CannotRun: it was to be spread.
        """
        if self.given:
            found = "a GGUF file is read whole, on one device"
            do = "Load it whole, save it with save_pretrained, and load that."
            raise CannotRun(f"load {name!r} with {' and '.join(self.given)}", found, do)
