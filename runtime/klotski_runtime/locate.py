"""Where a model's checkpoint lies: a folder, or a repository in the local Hugging Face cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from klotski_compiler.errors import ConfigError


def model_folder(model: str, option: str = "MODEL") -> Path:
    """The folder of ``model``, which is its path or its Hugging Face id; nothing is downloaded.

    option: what the user would give to name another one. Raises ConfigError where there is none.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        raise ConfigError(
            option,
            "",
            f"{model} is neither a folder nor in the local Hugging Face cache; give a checkpoint folder, or fetch the "
            "model with `hf download ORG/NAME`",
        ) from None
