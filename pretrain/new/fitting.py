"""A recipe that its own plan has nothing to say against: what `run --dry-run` would warn of is written otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory

from pretrain.core.errors import PretrainError
from pretrain.core.foreign import yaml
from pretrain.dial.law import MOST_PASSES, NEARLY_NEW
from pretrain.forecast import Forecast, check_documents, forecast, warnings
from pretrain.identity import plan
from pretrain.new.plans import MEASURED, Asked, recipe
from pretrain.recipe import check

RARER = {MEASURED: 0.1, 0.1: 0.2, 0.2: 0.5, 0.5: 0.0}  # shares of a training between two measurements
LOOK = 5.0  # seconds of reading: all the rows that the table was told by
PASSES = {"pretrain": MOST_PASSES, "continue": NEARLY_NEW}  # more teach little, or make it forget the rest


def fitted(asked: Asked, where: str) -> tuple[str, list[str]]:
    """The recipe's text, and what its plan warns of for all that; `where` is the file that it is to be written to."""
    if asked.init is not None and not asked.init.config:  # a hub's, of which nothing is known before it is fetched
        return recipe(asked), []
    with TemporaryDirectory() as folder:  # in which nothing is finished yet
        while True:
            text = recipe(asked)
            raw, places = yaml.loads(text, where)
            assert isinstance(raw, dict), "it was written as one"
            loaded = check(raw, None, places, folder)
            planned = plan(loaded)
            expected = forecast(planned)
            other = _eased(asked, expected)
            if other == asked:
                break
            asked = other
        try:
            odd = check_documents(loaded, planned, LOOK)
        except PretrainError as error:
            odd = [str(error)]
    return text, [*odd, *warnings(expected)]


def _eased(asked: Asked, expected: Sequence[Forecast]) -> Asked:
    """With what the plan asks for, as far as it can be changed without asking the user."""
    most = PASSES.get(asked.task)
    for each in expected:
        name = each.item.stage.name
        often = any(odd.field == "evaluate_every" for odd in each.estimate.warnings)
        share = asked.shares.get(name, MEASURED)
        if often and share in RARER:
            asked = replace(asked, shares={**asked.shares, name: RARER[share]})
        if name == "model" and most and asked.passes is None and (each.estimate.passes or 0) > most:
            asked = replace(asked, passes=most)
    return asked
