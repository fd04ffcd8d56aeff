"""Several small jobs that keep a store running: nightly, maintain, forget, doctor, submit."""
