"""What is made in `docs/`: pages from docstrings, recipes, papers and the command line; and how the site is built.

`python -m pretrain.docs` writes the pages anew; `mkdocs build` makes the site of them.
"""
