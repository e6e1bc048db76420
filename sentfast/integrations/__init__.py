"""Adapters to the libraries that sentfast accelerates."""
