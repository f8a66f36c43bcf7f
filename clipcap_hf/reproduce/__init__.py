"""Reproduce the paper's tables by one command: `clipcap reproduce`.

from clipcap_hf.reproduce import Settings, reproduce

rows = reproduce(Settings(("coco", "nocaps"), ("mlp", "transformer"), out="reproduction", data="data"))
"""

from .claims import TABLES, VARIANTS, Claim, claims_of
from .run import reproduce
from .settings import Settings
from .table import Row


__all__ = ["TABLES", "VARIANTS", "Claim", "Row", "Settings", "claims_of", "reproduce"]
