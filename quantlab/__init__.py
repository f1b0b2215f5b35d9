"""quantlab: quantize decoder-only language models, prove the result, serve it."""

__version__ = "0.1.0"
