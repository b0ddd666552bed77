"""What bench/ asks the simulator, for the pages in docs/: questions, the figures, and what is recorded of them.

Not in the wheel. `python -m bench.NAME` runs them; what runs on real sockets stands in bench/.
"""
