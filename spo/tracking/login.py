"""Login of W&B, apart from the tracker, which needs lightning."""

from __future__ import annotations

import netrc
import os
from urllib.parse import urlsplit

import wandb


def has_api_key() -> bool:
    """Return whether the environment or ``.netrc`` holds a key of W&B; no server is asked."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).netloc
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return server in hosts or any("wandb" in host for host in hosts)
