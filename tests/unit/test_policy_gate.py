"""The policy's quality, scored: ours at its defaults in a slice of the matrix, against its rivals at their best.

The rivals' scores and the cells that are known to miss are in `gate.json` of `extproc/simulate/studies/matrix`; how to
renew them stands in its `gate.py`. Simulated, deterministic, about a minute of CPU.
"""

from __future__ import annotations

import pytest

from extproc.simulate.studies.matrix import gate
from extproc.simulate.studies.matrix.cells import cell

RECORDS = gate.read()


@pytest.mark.parametrize("name", gate.names())
def test_the_defaults_hold_their_own_against_the_best_rival_in(name: str) -> None:
    wrong = gate.complaints(name, gate.play(cell(name)), RECORDS[name])
    assert not wrong, f"{name}: {'; '.join(wrong)}"
