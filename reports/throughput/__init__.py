"""Estimates of seconds beside published throughput: how far a roofline is off, and in which order.

`python -m reports.throughput` counts what each row of `rows.csv` computes and moves, on a simulated
card, and estimates its throughput.
"""
