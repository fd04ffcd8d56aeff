"""Queries of a store: SQL, search, status, recipes, and export."""
