"""A recording of a sidecar's core, run again through the real core: the same events, and the same decisions or not."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from extproc import __version__
from extproc.errors import ConfigError
from extproc.observe.packing import RecordingError
from extproc.observe.recording import Recording

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from extproc.observe.recording import Difference


def replay(path: Path, say: Callable[[str], None]) -> int:
    """Run it again and say how it went; 0: as recorded, 1: otherwise. Raises ConfigError when it can't be read."""
    outcomes: Counter[object] = Counter()
    difference, events = None, 0
    try:
        with path.open(encoding="utf-8") as file:
            recording = Recording(file)
            say(f"recorded by version {recording.version}, this is {__version__}")
            say(f"it began with {recording.core!r}")
            for found in recording.run(lambda decided: outcomes.update(outcome for _, outcome, *_ in decided)):
                events += 1
                if found is not None:
                    difference = found
                    break
    except OSError as error:
        raise ConfigError(str(path), [f"can't be read: {error.strerror or error}"]) from None
    except (RecordingError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [str(error)]) from None
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items(), key=str))
    say(f"{events} events, {outcomes.total()} decisions{': ' if told else ''}{told}")
    say(f"it ended with {recording.core!r}")
    if difference is None:
        say("the same decisions as recorded")
        return 0
    for line in _columns(difference):
        say(line)
    return 1


def _columns(difference: Difference) -> list[str]:
    """Show both columns of what was decided."""
    recorded = [" ".join(map(str, one)) for one in difference.recorded] or ["nothing"]
    now = [" ".join(map(str, one)) for one in difference.now] or ["nothing"]
    width = max(len("recorded"), *map(len, recorded))
    lines = [f"event {difference.number}, {difference.event!r}: decided otherwise", f"  {'recorded':{width}}   now"]
    for row in range(max(len(recorded), len(now))):
        left, right = ((side[row] if row < len(side) else "") for side in (recorded, now))
        lines.append(f"{'  ' if left == right else '! '}{left:{width}}   {right}")
    return lines
