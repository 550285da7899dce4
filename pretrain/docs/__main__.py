"""`python -m pretrain.docs`: write the made pages anew; those of kinds that are gone are removed."""

from pretrain.core.files import write_text
from pretrain.core.registry import PACKAGE
from pretrain.docs.made import made, stale

for path in stale(PACKAGE.parent):
    path.unlink()
for path, text in made(PACKAGE.parent).items():
    write_text(path, text)
