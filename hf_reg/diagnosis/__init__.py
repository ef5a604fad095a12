"""`diagnose`: what a run's logs show (over-fitting, a plateau, regularizers that do nothing), and what to try next."""

from .report import OverfitReport, diagnose


__all__ = ["OverfitReport", "diagnose"]
