"""Labelled images: the embedded digits, CIFAR, image folders, and anything of the user's, as batches on the device."""

from __future__ import annotations

from learn2perturb.data.batches import BatchSource, check_labels
from learn2perturb.data.dataset import ImageData, load_data
from learn2perturb.data.loader import make_source
from learn2perturb.data.streams import JoinedLast, class_difference, classes_of
from learn2perturb.data.subset import balanced_rows, warn_of_subset

__all__ = [
    "BatchSource",
    "ImageData",
    "JoinedLast",
    "balanced_rows",
    "check_labels",
    "class_difference",
    "classes_of",
    "load_data",
    "make_source",
    "warn_of_subset",
]
