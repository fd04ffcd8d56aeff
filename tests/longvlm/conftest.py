from journey import clips, in_process, indexed, model  # noqa: F401 - fixtures
