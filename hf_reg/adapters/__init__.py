"""Adapters that begin at the singular vectors of the weights they adapt."""
