"""Which weights training keeps."""
