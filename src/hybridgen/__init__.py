"""HybridGen: long-context language-model serving over GPU, DRAM and CXL memory.

The names below load on first use, so that `import hybridgen` and the command line stay quick: the
engine pulls in torch, which takes seconds.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridgen.engine.llm import LLM
    from hybridgen.engine.request import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":
        # Read once, when torch is imported; the reason is told in engine/client.py.
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
        from hybridgen.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from hybridgen.engine.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'hybridgen' has no attribute {name!r}")
