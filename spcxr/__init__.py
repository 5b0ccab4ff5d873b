"""spcxr: group-masked self-supervised vision transformers for chest X-rays.

``import spcxr`` is light: it loads neither torch nor any optional extra. What needs them is loaded
when it is first named.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spcxr.infer.encoder import Encoder, load_encoder
    from spcxr.infer.tensor_encoder import Features, RaggedFeatures

__version__ = "0.1.0"

__all__ = ["Encoder", "Features", "RaggedFeatures", "__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("spcxr.infer.encoder"), name)
    raise AttributeError(f"module 'spcxr' has no attribute {name!r}")
