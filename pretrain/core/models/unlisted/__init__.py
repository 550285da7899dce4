"""Models that no entry of the table of families describes: what is to be known of them, they are asked themselves."""
