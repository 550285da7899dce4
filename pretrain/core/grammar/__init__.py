"""Errors of grammar and spelling: made by rules, and told from a text and its correction as edits of tokens."""
