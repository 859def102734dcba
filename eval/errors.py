"""What evaluation raises when it can't go on."""


class EvalError(ValueError):
    """Bad input to an evaluation; the message names the file or value, what was expected and what to do."""
