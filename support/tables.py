"""Tables in Markdown, and how they get into a page: between two marks, so that no figure is typed by hand."""

from flags import InputError

from utils import write_whole

BEGIN, END = "<!-- begin: {} -->", "<!-- end -->"


def percent(share):
    """Return a share in [0, 1] as the tables have it."""
    return "–" if share is None else f"{100 * share:.2f}"


def markdown(header, rows):
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def put(path, name, table):
    """Replace what stands between the marks of `name` in the page `path`.

    Raises InputError when the page cannot be read, or has not just one such place.
    """
    begin = BEGIN.format(name)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise InputError(f"cannot read {path}: {reason}; name a folder that holds the page") from None
    if text.count(begin) != 1 or END not in text.partition(begin)[2]:
        raise InputError(f"{path} has no place for the table; put the lines {begin} and {END} into it")
    before, _, rest = text.partition(begin)
    new = f"{before}{begin}\n{table}\n{END}{rest.partition(END)[2]}"
    write_whole(path, lambda p: p.write_text(new))
