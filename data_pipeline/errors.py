"""The one error class of the data pipeline."""


class DataError(ValueError):
    """Bad input data. The message names the file, record or key, what was expected, what was found and what to do."""
