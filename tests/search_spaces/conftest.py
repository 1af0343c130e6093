from hypothesis import settings

# The first example of a test may import jsonschema or Optuna, and the machine may be busy: time says nothing here.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
