"""Images in and out: files, tiles and colour."""
