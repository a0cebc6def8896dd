"""An SAE from residuals: streamed or kept in shards, trained, measured."""

from .quality import Quality, ZeroShot, evaluate, spliced
from .residuals import Batches, Shards, Stream, write_shards
from .runs import train, train_checkpoint, train_in_memory
from .trainer import Progress, TrainConfig, Trainer

__all__ = [
    "Batches",
    "Progress",
    "Quality",
    "Shards",
    "Stream",
    "TrainConfig",
    "Trainer",
    "ZeroShot",
    "evaluate",
    "spliced",
    "train",
    "train_checkpoint",
    "train_in_memory",
    "write_shards",
]
