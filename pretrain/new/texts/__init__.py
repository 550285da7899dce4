"""The texts of a folder: their languages, beginnings to go on from, and those in files that have to be opened."""
