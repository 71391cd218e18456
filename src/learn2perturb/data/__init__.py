"""Labelled images: the embedded digits, CIFAR, image folders, and anything of the user's, as batches on the device."""

from __future__ import annotations

from learn2perturb.data.dataset import ImageData, load_data
from learn2perturb.data.loader import BatchSource, make_source

__all__ = ["BatchSource", "ImageData", "load_data", "make_source"]
