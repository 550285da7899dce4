"""What processes take of a processor: other work on the machine is not counted, though it slows them."""

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap
from functools import cache


def python(code, **more):
    """What a fresh process prints, and the seconds of a processor that it takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, **more
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


EMPTY = """
import typer, typer.rich_utils

app = typer.Typer()

@app.command()
def nothing(count: int = 1, json: bool = False): ...

@app.command()
def more(): ...

app(["nothing", "--count", "2"])
"""


@cache
def libraries(attempt=0):
    """The seconds of a command that does nothing: the least of three, measured anew at each attempt."""
    return min(python(EMPTY)[1] for _ in range(3))
