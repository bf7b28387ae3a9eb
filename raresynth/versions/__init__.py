"""The versions of an image set that DVC keeps in a git repository: found, fetched, published."""
