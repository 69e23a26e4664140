"""Queries that are one differentiable number of the model, with data of their own.

`Property` is what a property of your own derives from; the others are ready made.
"""

from .property import Property
from .ready_made import (
    CalibrationError,
    DemographicParityGap,
    EqualisedOddsGap,
    MeanLoss,
    MeanMeasurement,
    SliceMargin,
    SoftAccuracy,
    SoftF1,
    probabilities,
)

__all__ = [
    "CalibrationError",
    "DemographicParityGap",
    "EqualisedOddsGap",
    "MeanLoss",
    "MeanMeasurement",
    "Property",
    "SliceMargin",
    "SoftAccuracy",
    "SoftF1",
    "probabilities",
]
