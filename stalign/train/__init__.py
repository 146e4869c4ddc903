"""Train models: configs, losses, and the run itself. Needs the extra ``train``."""

from __future__ import annotations

from stalign.train import losses
from stalign.train._config import PretrainConfig, read_config
from stalign.train._data import Section
from stalign.train._pretrain import pretrain

__all__ = ["PretrainConfig", "Section", "losses", "pretrain", "read_config"]
