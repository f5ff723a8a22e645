"""Simulated and real devices that run workloads."""
