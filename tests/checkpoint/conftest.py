from tests.train.engines import restore_linear  # noqa: F401  # a fixture for all tests here
