"""A model's inputs and loss where the user gives none: read from the model, tried in dry runs.

Imports the sample, the record and the loss of workload; complete and spec may import it.
"""
