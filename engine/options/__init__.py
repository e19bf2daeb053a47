"""What the fields of an options struct are to people: flags, variables, values in words, rows of a page."""
