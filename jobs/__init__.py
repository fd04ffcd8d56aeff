"""Ray wiring, one readable file a job, and the command line over them."""
