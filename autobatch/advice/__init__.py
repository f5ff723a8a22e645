"""What a plan means for training: facts, sentences and a loop to paste, all from its record.

Imports records and support; plan and report import its modules.
"""
