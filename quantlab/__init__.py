"""quantlab: quantize decoder-only language models, prove the result, serve it."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded when first asked for: `import quantlab` stays without torch.
_LATER = {
    "LLM": "quantlab.llm",
    "Completion": "quantlab.llm",
    "SamplingParams": "quantlab.runtime.request",
    "Grammar": "quantlab.runtime.request",
    "EngineOptions": "quantlab.runtime.options",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'quantlab' has no attribute '{name}'")
    return getattr(import_module(_LATER[name]), name)
