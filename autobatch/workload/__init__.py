"""What is trained: model, batches, loss, optimizer, and the training window that runs them.

Imports memory (for phases) and support; devices, tuning and everything above may import it.
"""
