"""Verdicts of `check_equivalence` beside gradients that plain PyTorch adds up."""
