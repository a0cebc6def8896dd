"""From a CLIP's name to a defended one: each way falls through to the next, and says its cost before it starts."""

from .estimates import FitCost, TrainCost, fit_cost, train_cost
from .material import Wanted, wanted_pictures
from .route import Request, protect

__all__ = ["FitCost", "Request", "TrainCost", "Wanted", "fit_cost", "protect", "train_cost", "wanted_pictures"]
