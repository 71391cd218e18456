"""Defaults of the evaluations, one source for Python and the command line; knows no torch, so that ``--help`` is fast.

A seed gives one number only with one batch size, one engine and one count of draws, so none of them is written twice.
"""

from __future__ import annotations

from learn2perturb.sizes import LINF_EPS

SEED = 0
EPS = LINF_EPS  # where neither a run nor the caller says; what has another norm has no default
# Float32: equal numbers on hardware with bfloat16 and without.
ENGINE = "plain"

# evaluate, reproduce
DRAWS = 10
MEMBERS = 10
EVALUATE_BATCH_SIZE = 256

# reproduce: as the paper attacks
REPRODUCE_EOT = 1

# diagnose: a batch is attacked hundreds of times, so that it is small enough to show progress
BUDGET = "quick"
DIAGNOSE_BATCH_SIZE = 100

# certify
METHOD = "auto"
CHOOSING_DRAWS = 100
CERTIFYING_DRAWS = 100_000
ALPHA = 0.001
CERTIFY_BATCH_SIZE = 1000
