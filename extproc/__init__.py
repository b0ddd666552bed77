"""The waiting room for GPUs: an Envoy ext_proc sidecar that holds LLM requests until an engine has room."""

import os

if os.environ.get("EXTPROC_PURE"):
    from extproc.pure import prefer_source

    prefer_source()

__version__ = "0.1.0"
