"""spcxr: group-masked self-supervised vision transformers for chest X-rays.

``import spcxr`` is light: it loads neither torch nor any optional extra.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
