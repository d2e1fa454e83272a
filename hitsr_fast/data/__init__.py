"""Training data: photos from folders, and low-resolution inputs made from them."""
