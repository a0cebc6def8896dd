"""A defense from an SAE: pictures to fit on, the choice of latents, blocks and scopes, thresholds, the report."""

from .calibrate import Calibration, calibrated
from .config import FitConfig
from .encoded import Encoded
from .from_pictures import metadata_material, spurious_material, text_material
from .material import Groups, Material, Pairs
from .metadata import Metadata, read_metadata
from .placing import Fitted, fit_defense, with_golden
from .selecting import GroupFit, Ranking, Selection, TextFit
from .sites import FittedSite, SitePlan, fit_sites, plan_sites
from .validation import CrossValidation, cross_validate, measure

__all__ = [
    "Calibration",
    "CrossValidation",
    "Encoded",
    "FitConfig",
    "Fitted",
    "FittedSite",
    "GroupFit",
    "Groups",
    "Material",
    "Metadata",
    "Pairs",
    "Ranking",
    "Selection",
    "SitePlan",
    "TextFit",
    "calibrated",
    "cross_validate",
    "fit_defense",
    "fit_sites",
    "measure",
    "metadata_material",
    "plan_sites",
    "read_metadata",
    "spurious_material",
    "text_material",
    "with_golden",
]
