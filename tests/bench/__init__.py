"""PyTorch's own CUDA code on a simulated CUDA runtime: a card for tests, where there is no GPU.

README.md says what is true of it, and what is not.
"""
