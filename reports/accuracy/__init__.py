"""Predicted peaks beside peaks that others measured."""
