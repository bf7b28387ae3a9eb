"""Images and their manifest: importers, splits, validation, packed pixels."""
