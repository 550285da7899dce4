"""The boundary where what others have written comes in: files, YAML, JSON, compressed files, arrays, weights, texts.

Every reader of the package opens and parses through here. What cannot be bounded is refused before it is tried: a file
that is no regular one, one that is too large, one that unpacks to too much; nesting, numbers and aliases without end.
Whatever a parser raises becomes the one-line error (`parsing`).
"""
