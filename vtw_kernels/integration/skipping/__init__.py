"""Attention that is skipped (EAS), and the adapters that may stand in its place."""
