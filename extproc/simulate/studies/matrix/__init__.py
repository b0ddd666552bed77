"""The scored matrix: engines x pages x traffic x loads, every rival at its best in each cell; does ours keep up?

`make bench-matrix` plays the whole, `tests/unit/test_policy_gate.py` a slice, `python -m bench.matrix` any cell.
"""
