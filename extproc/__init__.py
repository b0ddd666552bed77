"""The waiting room for GPUs: an Envoy ext_proc sidecar that holds LLM requests until an engine has room."""

__version__ = "0.1.0"
