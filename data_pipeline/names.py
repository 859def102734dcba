"""Names that stand in files: of shards, identities, checkpoints. Whoever wrote the file must not choose where on the disk they lead."""


def is_plain_name(name: object) -> bool:
    """Whether ``folder / name`` lies directly in ``folder``, whatever the folder: a text without slash or NUL, neither ``.`` nor ``..``."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name
