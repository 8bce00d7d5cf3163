"""Optional packages: which extra of ours installs them, and what to say where one is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

TRUST_VARIABLE = "DIFFPOLICY_TRUST_ENVS"
"""Names packages whose code files may name (with commas between them), or is ``true`` for all."""

EXTRAS = {
    "h5py": "hdf5",
    "pyarrow": "lerobot",
    "av": "lerobot",
    "sentence_transformers": "language",
    "minari": "minari",
    "matplotlib": "media",
    "PIL": "media",
    "imageio": "media",
    "imageio_ffmpeg": "media",
    "onnxruntime": "onnx",
    "onnx": "onnx",
    "openvino": "openvino",
    "stable_baselines3": "sb3",
    "sb3_contrib": "tqc",
    "tensorboard": "tensorboard",
    "sklearn": "anchors",
    "timm": "timm",
    "websockets": "serve",
    "msgpack": "serve",
}
"""The extra that installs a package, by the package's module.

Simulators are declared beside the environments: see :mod:`diffpolicy.rollout.declared`.
"""


def installed(module: str) -> bool:
    """Return whether a top-level module can be imported; it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def need(module: str) -> Any:
    """Import a module of an optional package.

    Raises:
        ImportError: it is not installed, or does not fit what is; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # the last of parts of other releases
        package = module.partition(".")[0]
        missing = (getattr(error, "name", None) or "").partition(".")[0]
        missing = package if not missing and isinstance(error, ImportError) else missing
        why = "is not installed" if missing == package else f"cannot be imported: {error}"
        raise ImportError(
            f"this needs the package {package!r}, which {why}; "
            f'run: pip install "diffpolicy[{EXTRAS[package]}]"'
        ) from error


def pip_hint(text: str) -> str:
    """Say how to install what a message names, if it is an optional package that is missing."""
    for module, extra in EXTRAS.items():
        if module in text and not installed(module):
            return f' Try: pip install "diffpolicy[{extra}]"'
    return ""


def trusts(package: str) -> bool:
    """Return whether the user lets files name code of a package, by ``DIFFPOLICY_TRUST_ENVS``."""
    named = {name.strip() for name in os.environ.get(TRUST_VARIABLE, "").split(",")}
    return bool({package, "true"} & (named - {""}))
