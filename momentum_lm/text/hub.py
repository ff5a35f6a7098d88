"""Whether the Hugging Face hub is there."""

from __future__ import annotations

import logging


def hub_answers() -> bool:
    """False without a network: the libraries would not know before they had tried again for up to a minute, and told of
    every try.
    """
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # of requests or of httpx, by the version of huggingface_hub
        return False
    return True
