"""What every job needs of Ray: a session, resources, counts of work, retries, metrics, logs and progress."""
