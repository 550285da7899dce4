"""What holds texts in a form of its own: pages of HTML, PDF, records of the web (WARC), archives of files."""
