"""Small modules without a subject of their own: files, units, process state, private PyTorch.

They import nothing of autobatch but its errors; everything may import them.
"""
