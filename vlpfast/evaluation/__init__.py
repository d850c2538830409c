"""Evaluation: retrieval, zero-shot classification, the report."""
