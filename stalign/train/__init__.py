"""Train models: configs, losses, and the run itself. Needs the extra ``train``."""

from __future__ import annotations

from stalign.train import losses
from stalign.train._config import ObjectiveConfig, PretrainConfig, read_config
from stalign.train._data import Section
from stalign.train._familiarity import add_familiarity
from stalign.train._finetune import finetune
from stalign.train._pretrain import pretrain
from stalign.train._sections import save_sections
from stalign.train._shards import Shards, open_shards, verify_shards

__all__ = [
    "ObjectiveConfig",
    "PretrainConfig",
    "Section",
    "Shards",
    "add_familiarity",
    "finetune",
    "losses",
    "open_shards",
    "pretrain",
    "read_config",
    "save_sections",
    "verify_shards",
]
