"""What is trained: model, batches, loss and optimizer, completed, and the window that runs them.

Imports memory (its phases), support and errors; exports, advice, devices and all above may import
it. `infer` finds inputs where a user gives none, `spec` loads a model that is named by a string.
"""
