"""Training steps of packages that people use: does a plan come out, and is it right?"""
