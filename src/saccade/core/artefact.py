"""Learned or calibrated state: tensors in a safetensors file, and beside it a JSON card that says what they are for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from saccade.core.errors import BadArtefact, CannotRun
from saccade.core.paths import SHIPPED, cache_dir


@dataclass(frozen=True)
class Artefact:
    """What `calibrate` makes and `attach` finds again.

    `fingerprint` is a hash of the model's weights and shapes: an artefact is used only with the model it was made from.
    `data` and `seed` say what it was made on; `figures` what was seen on the way (losses, agreement).
    """

    method: str
    tensors: Mapping[str, Tensor]
    model: str
    fingerprint: str
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    seed: int = 0
    version: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write PATH.safetensors and PATH.json; returns the former.

        Raises:
            CannotRun: the folder is read-only or the disk full; an older artefact there is left whole.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path).with_suffix(".safetensors")
        draft, words_draft = path.with_suffix(".tensors-draft"), path.with_suffix(".words-draft")
        words = {k: v for k, v in asdict(_without_tensors(self)).items() if k != "tensors"}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in self.tensors.items()}, draft)
            words_draft.write_text(json.dumps(words, indent=1, sort_keys=True) + "\n")
            draft.replace(path)
            words_draft.replace(path.with_suffix(".json"))
        except (OSError, SafetensorError) as e:
            do = "Make room, or move the cache with SACCADE_CACHE."
            raise CannotRun(f"save the artefact {path}", f"it cannot be written ({e})", do) from e
        return path

    @classmethod
    def load(cls, path: str | Path) -> Artefact:
        """Read what `save` wrote.

        Raises:
            BadArtefact: a file is missing, truncated or not one of ours.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path).with_suffix(".safetensors")
        try:
            words = json.loads(path.with_suffix(".json").read_text())
            return cls(tensors=load_file(path), **words)
        except (OSError, SafetensorError, ValueError, TypeError) as e:
            raise BadArtefact(f"artefact {path}", f"it cannot be read ({e})", "Make it again: saccade calibrate") from e

    @classmethod
    def find(cls, method: str, fingerprint: str) -> Artefact | None:
        """The artefact of this method for this very model: the user's own before the shipped one, or None."""
        for folder in (cache_dir("artefacts", method), SHIPPED / method):
            for file in sorted(folder.glob("*.json")):
                try:
                    made_for = json.loads(file.read_text()).get("fingerprint")
                except (OSError, ValueError) as e:
                    raise BadArtefact(f"artefact {file}", f"it cannot be read ({e})", "Delete it.") from e
                if made_for == fingerprint:
                    return cls.load(file)
        return None


@dataclass(frozen=True)
class Draft:
    """What a calibration has done so far, kept in a folder so that it goes on there when it is interrupted.

    folder: None: nothing is kept
    """

    folder: Path | None = None

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What was saved under this name, or None.

        Raises:
            BadArtefact: the file is truncated or not one of ours.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._file(name)
        if file is None or not file.exists():
            return None
        try:
            return load_file(file)
        except (OSError, SafetensorError) as e:
            raise BadArtefact(f"draft {file}", f"it cannot be read ({e})", "Delete its folder.") from e

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """In place of what was saved under this name.

        Raises:
            CannotRun: the folder is read-only or the disk full.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        file = self._file(name)
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in tensors.items()}, file.with_suffix(".draft"))
            file.with_suffix(".draft").replace(file)
        except (OSError, SafetensorError) as e:
            do = "Make room, or move the cache with SACCADE_CACHE."
            raise CannotRun(f"keep the draft {file}", f"it cannot be written ({e})", do) from e

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What was saved under this name, else made and saved now."""
        found = self.load(name)
        if found is None:
            found = make()
            self.save(name, found)
        return found

    def clear(self) -> None:
        """Forget all of it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"


def _without_tensors(a: Artefact) -> Artefact:
    return Artefact(**{**{k: getattr(a, k) for k in a.__dataclass_fields__}, "tensors": {}})
