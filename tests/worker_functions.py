"""What workers are given to do in tests: of a file that imports little, since each of them imports it."""

from __future__ import annotations

import os

from pretrain.core.errors import PretrainError


def lengths(rows):
    return [len(row) for row in rows]


def deadly(rows):
    if rows == ["die"]:
        os._exit(9)
    return rows


def wrong(rows):
    raise PretrainError("here: what is wrong; accepted: nothing")
