"""From what is deployed back to the raw images, every hash computed again."""
