"""Files that must be opened to come to their text: archives of files, HTML, PDF and WARC."""
