"""Checkpoints from and for other programs: a file for each format, beside the one in which all stages work.

What comes in becomes a folder in Hugging Face format once, whole or not at all; what goes out is read back and
compared.
"""
