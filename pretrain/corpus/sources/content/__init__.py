"""The documents that the content of a file is: its rows, its conversations, the parts of a long text."""
