"""A transformers model in a folder on disk: checked, told apart from others, loaded once for all experts that share it.

Nothing is ever downloaded and no code of the folder is run; weights are safetensors, or .bin read with weights_only.
"""

from __future__ import annotations

import json
import pickle
import threading
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bestiary.description.words import ExpertError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_WEIGHTS = (".safetensors", ".bin")
_WORDS = (".json", ".txt", ".model")
# Two fine-tunes of one model have files of equal names and sizes; a few blocks of each tell them apart in no time.
_BLOCKS, _BLOCK_BYTES = 64, 4096


@dataclass(slots=True)
class ModelFolder:
    """Where a published model lies and how it is to run; the model itself is opened by the first `load`.

    path: a folder with config.json, weights and the processor's files, as the Hub has them.
    device: a torch device, such as 'cpu' or 'cuda:0'. dtype: a key of DTYPES.
    Pickling leaves the opened model behind, so that a worker opens its own.
    """

    path: Path
    device: str = "cpu"
    dtype: str = "float32"
    _opened: tuple[str, Any, Any] | None = field(default=None, init=False, repr=False, compare=False)
    _opening: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} of {self.path} is unknown; use {', '.join(DTYPES)}")

    def __getstate__(self) -> tuple[Path, str, str]:
        return self.path, self.device, self.dtype

    def __setstate__(self, state: tuple[Path, str, str]) -> None:
        self.__init__(*state)  # type: ignore[misc]  # as if made anew: nothing opened

    def check(self, model_type: str, source: str) -> None:
        """Raise a ValueError that names the folder and the remedy unless it holds a model of this type.

        source: the Hub's name of the published model, for the message.
        """
        remedy = f"put a copy there: hf download {source} --local-dir {self.path}"
        if not (self.path / "config.json").is_file():
            kind = "has no config.json" if self.path.is_dir() else "is no folder"
            raise ValueError(f"{self.path} {kind}, and nothing is downloaded here; {remedy}")
        found = self._config().get("model_type")
        if found != model_type:
            raise ValueError(f"{self.path} holds a model of type {found!r}, wanted is {model_type!r}; {remedy}")
        if not self._files(_WEIGHTS):
            raise ValueError(f"{self.path} has no weights (*.safetensors or *.bin); {remedy}")

    def identity(self) -> str:
        """Twelve letters that change with the folder's configuration, vocabulary, weights or the dtype."""
        digest = sha256(self.dtype.encode())
        for file in self._files(_WORDS + _WEIGHTS):
            size = file.stat().st_size
            digest.update(f"\n{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                if file.suffix in _WORDS:
                    digest.update(stream.read())
                    continue
                for block in range(_BLOCKS):
                    stream.seek(block * size // _BLOCKS)
                    digest.update(stream.read(_BLOCK_BYTES))
        return digest.hexdigest()[:12]

    def load(self, model_class: str) -> tuple[Any, Any]:
        """The model (eval, on its device) and its processor; opened once. ExpertError with one line if that fails.

        model_class: name of a class of transformers.
        """
        with self._opening:
            if self._opened is None:
                try:
                    self._opened = (model_class, *self._open(model_class))
                except pickle.UnpicklingError as error:
                    raise ExpertError(
                        f"a .bin file in {self.path} holds more than tensors and is not opened; take safetensors"
                    ) from error
                except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
                    line = (str(error).strip() or repr(error)).splitlines()[0]
                    raise ExpertError(f"{self.path} cannot be opened as {model_class}: {line}") from error
            opened_as, model, processor = self._opened
        assert opened_as == model_class, f"{self.path} is open as {opened_as}, not {model_class}"
        return model, processor

    def to_device(self, inputs: Any) -> Any:
        """A processor's tensors on the model's device, the broken numbers in its dtype."""
        return inputs.to(self.device, DTYPES[self.dtype])

    def _open(self, model_class: str) -> tuple[Any, Any]:
        import transformers  # heavy, and only a run that uses such an expert needs it

        # Pillow's resize, as the published scripts; without it the choice hangs on whether torchvision is installed.
        processor = transformers.AutoProcessor.from_pretrained(self.path, local_files_only=True, backend="pil")
        model, report = getattr(transformers, model_class).from_pretrained(
            self.path,
            local_files_only=True,
            use_safetensors=bool(self._files((".safetensors",))),
            weights_only=True,
            dtype=DTYPES[self.dtype],
            output_loading_info=True,
        )
        if lost := sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]):
            raise ValueError(f"{len(lost)} tensors are missing or of another shape, such as {lost[0]}; not its weights")
        return model.to(self.device).eval(), processor

    def _config(self) -> dict[str, Any]:
        try:
            config = json.loads((self.path / "config.json").read_bytes())
        except ValueError as error:
            raise ValueError(f"{self.path / 'config.json'} is not JSON ({error}); copy it again") from error
        return config if isinstance(config, dict) else {}

    def _files(self, suffixes: tuple[str, ...]) -> list[Path]:
        return sorted(file for file in self.path.iterdir() if file.suffix in suffixes and file.is_file())
