from journey import clips, driver, in_process, indexed, model, on_ray, ray_session, source  # noqa: F401 - fixtures
