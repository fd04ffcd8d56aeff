"""Operations: the jobs that keep a store running (nightly, maintain, forget), doctor and submit."""
