"""Predictions beside PyTorch's CUDA code on a simulated runtime, allocation by allocation."""
