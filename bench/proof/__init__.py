"""`make bench`: is a queue before the engines worth it, against what else one could put there, on real Envoy?

experiments.py says what is run, fronts.py and engines.py start it, load.py sends the requests, figures.py counts,
virtual.py runs the sweeps on a virtual clock, page.py writes docs/benchmarks.md. `python -m bench.proof --help`.
"""
