"""Labelled images: the embedded digits, CIFAR, image folders, and anything of the user's, as batches on the device."""

from __future__ import annotations

from learn2perturb.data.dataset import ImageData, load_data
from learn2perturb.data.loader import BatchSource, check_labels, make_source

__all__ = ["BatchSource", "ImageData", "check_labels", "load_data", "make_source"]
