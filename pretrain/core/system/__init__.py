"""What differs by machine: operating systems (`portable`), a checkout or an installed package (`shipped`)."""
