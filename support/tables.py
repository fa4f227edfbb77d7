"""Tables of text cells, for a terminal and in Markdown."""


def text_table(rows):
    """Rows of cells, the heading first -> lines: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def markdown_table(rows):
    """The same in Markdown."""
    heading, *body = ("| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows)
    return "\n".join([heading, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body])
