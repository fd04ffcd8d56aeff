"""Tokens to tables to SQL: shards, the ledger that makes them exist, and the catalog that queries them."""
