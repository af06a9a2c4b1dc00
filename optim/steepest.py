"""Steepest descent under a norm (Bernstein and Newhouse, "Old Optimizer, New Norm", arXiv 2409.20325)."""

import torch
from torch import Tensor

from optim.lmo import dual_norm, lmo
from optim.matrix import Group, MatrixOptimizer
from optim.polar import polar_flops
