"""A student in other programs' formats, written by their own libraries and verified before it is left."""
