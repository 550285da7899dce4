"""Which language a text is in, by the package py3langid: 139 languages, without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.core.system.extras import extras_named

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier


def identifier() -> LanguageIdentifier:
    """What tells a text's language, as an ISO 639 code, and how probable it is; its `labels` are the languages."""
    with extras_named():
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
