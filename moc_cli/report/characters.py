"""Characters that a terminal shows, and those that would steer it."""

LINES = "\u2028\u2029"  # blanks that end a line


def printable(text: str) -> str:
    """Return `text` with control characters (of a user's file or path) made visible."""
    return "".join(
        char if char == "\n" or is_plain(char) else char.encode("unicode_escape").decode()
        for char in text
    )


def is_plain(char: str) -> bool:
    """Whether a character is itself on every terminal; blanks of all kinds are."""
    return char.isprintable() or (char.isspace() and char >= "\xa0" and char not in LINES)
