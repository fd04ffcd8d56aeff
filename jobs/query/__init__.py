"""Looking into a store: SQL, search, status, recipes, and export."""
