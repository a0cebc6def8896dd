"""A defense from an SAE: pictures to fit on, the choice of latents, blocks and scopes, thresholds, the report."""

from defense.data.progress import SILENT, Progress

from .calibrate import Calibration, calibrated
from .config import FitConfig
from .encoded import Encoded
from .from_pictures import metadata_material, spurious_material, text_material
from .gates import GATES, Gates, explained_variance
from .material import Groups, Material, Pairs
from .metadata import Metadata, read_metadata
from .placing import Fitted, fit_defense, with_golden
from .selecting import GroupFit, Ranking, Selection, TextFit
from .shipping import Shipped, ship
from .sites import FittedSite, SitePlan, fit_sites, plan_sites
from .validation import CrossValidation, cross_validate, measure

__all__ = [
    "GATES",
    "SILENT",
    "Calibration",
    "CrossValidation",
    "Encoded",
    "FitConfig",
    "Fitted",
    "FittedSite",
    "Gates",
    "GroupFit",
    "Groups",
    "Material",
    "Metadata",
    "Pairs",
    "Progress",
    "Ranking",
    "Selection",
    "Shipped",
    "SitePlan",
    "TextFit",
    "calibrated",
    "cross_validate",
    "explained_variance",
    "fit_defense",
    "fit_sites",
    "measure",
    "metadata_material",
    "plan_sites",
    "read_metadata",
    "ship",
    "spurious_material",
    "text_material",
    "with_golden",
]
