"""How Hebbian a training run is: cosines of learning signals with the Hebbian direction.

`Monitor` measures any model while it trains; where measurements go is in `sinks`.
"""

from ghl.alignment import sinks
from ghl.alignment.monitor import Monitor

__all__ = ["Monitor", "sinks"]
