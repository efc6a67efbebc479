"""The one exception that users see."""


class PumiceError(Exception):
    """Bad input or an impossible request: the message names the argument, its value and the remedy."""
