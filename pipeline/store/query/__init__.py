"""What is asked of a store: SQL of a user's own, rows as text, search by text."""
