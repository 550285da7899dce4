"""How long documents are looked at before anything runs, so that a plan is told at once, on a busy machine too.

Seconds are the processor's: others that want it make a look slower, and no shorter.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

SECONDS = 20.0  # of reading for `pretrain corpus`
LEAST, LEAST_BYTES = 64, 256_000  # documents and bytes that are looked at in any case, if there are as many
LARGE = 16  # times the least documents, or bytes, which are enough whatever the other is
LONGER = 3  # times its seconds of the processor that a look may take, if it sees all with that
WAITED = 10  # times its seconds that a look may take by the clock, where disks or others are slow


@dataclass
class Glance:
    """A look at documents one after another, for so many seconds of the processor, and at the least amount anyway.

    Where there are so few bytes (`whole`) that they come in a little longer, it takes that: what is seen in whole is
    known, and is no guess.
    """

    seconds: float
    whole: float = math.inf
    documents: int = 0
    bytes: float = 0.0
    taken: float = 0.0  # seconds of the processor up to the last document
    _begun: tuple[float, float] = field(default_factory=lambda: (time.process_time(), time.perf_counter()))

    @property
    def least(self) -> bool:
        """Whether what was looked at can tell of the rest."""
        shares = self.documents / LEAST, self.bytes / LEAST_BYTES
        return min(shares) >= 1 or max(shares) >= LARGE

    @property
    def spent(self) -> float:
        """Seconds of the processor since it began."""
        return time.process_time() - self._begun[0]

    def enough(self, size: float) -> bool:
        """Count a document of so many bytes; whether to stop with it."""
        self.documents, self.bytes = self.documents + 1, self.bytes + size
        self.taken = spent = self.spent
        longer = LONGER * self.seconds
        soon = spent < longer and self.bytes * longer >= self.whole * spent
        late = (spent > self.seconds and not soon) or time.perf_counter() - self._begun[1] > WAITED * self.seconds
        return late and self.least
