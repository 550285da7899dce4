"""What weights a training ends with: averages of those on its way, or the best of them."""
