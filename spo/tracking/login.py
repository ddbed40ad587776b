"""Whether W&B knows this person; apart from the tracker, which needs lightning."""

from __future__ import annotations

import netrc
import os
from urllib.parse import urlsplit

import wandb


def has_api_key() -> bool:
    """Whether a key is set in the environment or in ``.netrc``, found out without asking a server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).netloc
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return server in hosts or any("wandb" in host for host in hosts)
